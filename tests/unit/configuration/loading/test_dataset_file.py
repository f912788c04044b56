"""The dataset json."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices import image_files
from simpletuner.helpers.configuration.schema.aspect_buckets import AspectBucket
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig

if TYPE_CHECKING:
    from conftest import Workspace


def loaded(workspace: Workspace, **changes: object) -> DatasetConfig:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images"} | changes]
    (dataset,) = workspace.load().datasets
    return dataset


def refused(workspace: Workspace, **changes: object) -> str:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images"} | changes]
    message = workspace.problems()
    assert message.startswith("data.json: 1 problem\n"), message
    return message


def test_a_dataset_inherits_from_config_json(workspace: Workspace) -> None:
    workspace.config |= {
        "resolution": 0.5,
        "resolution_type": "area",
        "minimum_image_size": 0.25,
        "caption_strategy": "filename",
        "instance_prompt": "a cat",
    }
    dataset = loaded(workspace)
    assert (dataset.resolution, dataset.resolution_type, dataset.minimum_image_size) == (0.5, "area", 0.25)
    assert (dataset.caption_strategy, dataset.instance_prompt) == ("filename", "a cat")


def test_a_dataset_inherits_what_the_family_gives(workspace: Workspace) -> None:
    assert loaded(workspace).resolution == 512


def test_a_dataset_overrides_what_it_inherits(workspace: Workspace) -> None:
    workspace.config |= {"resolution": 512, "instance_prompt": "a cat"}
    dataset = loaded(workspace, resolution="256", resolution_type="pixel", instance_prompt="a dog")
    assert (dataset.resolution, dataset.resolution_type, dataset.instance_prompt) == (256.0, "pixel", "a dog")


def test_a_null_in_a_dataset_inherits(workspace: Workspace) -> None:
    workspace.config["caption_strategy"] = "filename"
    assert loaded(workspace, caption_strategy=None).caption_strategy == "filename"


def test_every_dataset_has_a_latent_cache_of_its_own(workspace: Workspace) -> None:
    workspace.image_folder("more")
    workspace.datasets = [
        {"id": "photos", "instance_data_dir": "images"},
        {"id": "more", "instance_data_dir": "more", "cache_dir_vae": "own/{id}/{model_family}"},
    ]
    config = workspace.load(cache_dir_vae="latents")
    assert [dataset.cache_dir_vae for dataset in config.datasets] == [
        workspace.folder / "latents" / "photos",
        workspace.folder / "own" / "more" / "toy",
    ]


def test_spellings_of_one_value_are_the_same(workspace: Workspace) -> None:
    dataset = loaded(
        workspace, crop_style="centre", caption_strategy="instance_prompt", instance_prompt="a cat"
    )
    assert (dataset.crop_style, dataset.caption_strategy) == ("center", "instanceprompt")


def test_sizes_of_crops_are_inherited_and_overridden(workspace: Workspace) -> None:
    workspace.datasets = [
        {"id": "photos", "instance_data_dir": "images", "crop": True},
        {
            "id": "own",
            "instance_data_dir": "images",
            "crop": True,
            "maximum_image_size": 3000,
            "target_downsample_size": None,
            "max_upscale_threshold": "0",
        },
    ]
    inherited = {"maximum_image_size": 2048, "target_downsample_size": "1024", "max_upscale_threshold": 0.2}
    photos, own = workspace.load(**inherited).datasets
    assert (photos.downsampling, photos.max_upscale_threshold) == ((2048, 1024), 0.2)
    assert (own.downsampling, own.max_upscale_threshold) == ((3000, 1024), 0)


@pytest.mark.parametrize(
    "keys",
    [
        {"crop": False, "maximum_image_size": 2048, "target_downsample_size": 100},
        {"crop": True, "maximum_image_size": 2048, "target_downsample_size": 512},
        {"crop": True, "maximum_image_size": 2048},
        {"crop": True, "target_downsample_size": 100},
        {"crop": True, "maximum_image_size": 0, "target_downsample_size": 100},
    ],
)
def test_a_maximum_without_effect_is_no_mistake(workspace: Workspace, keys: dict[str, object]) -> None:
    assert loaded(workspace, **keys).downsampling is None


def test_aspect_buckets_are_numbers_or_objects(workspace: Workspace) -> None:
    numbers = loaded(workspace, crop_aspect_buckets=["0.5", 1, 1.5]).crop_aspect_buckets
    assert numbers == (0.5, 1.0, 1.5)
    thirds = [{"aspect": 0.5, "weight": 0.1}, {"aspect": "2", "weight": "0.2"}, {"aspect": 1, "weight": 0.7}]
    found = loaded(workspace, crop_aspect_buckets=thirds).crop_aspect_buckets
    assert found == tuple(AspectBucket(aspect=a, weight=w) for a, w in ((0.5, 0.1), (2, 0.2), (1, 0.7)))
    assert loaded(workspace, crop_aspect="random", crop_aspect_buckets="").crop_aspect_buckets == ()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"instance_data_dir": "nowhere"}, 'photos.instance_data_dir  "nowhere": not found'),
        ({"instance_data_dir": "config.json"}, 'photos.instance_data_dir  "config.json": .*folder'),
        (
            {"instance_data_dir": "ftp://host/x"},
            'photos.instance_data_dir  "ftp://h.*ftp:// is not supported',
        ),
        ({"instance_data_dir": None}, "photos.instance_data_dir  required"),
        ({"id": None}, r"\[0\].id  required"),
        ({"repeats": -1}, "photos.repeats  -1: .* 0"),
        ({"probability": 0}, "photos.probability  0: .* 0"),
        ({"crop": "perhaps"}, 'photos.crop  "perhaps": .*true or false'),
        ({"crop_aspect": "closest", "crop": True}, "photos.crop_aspect_buckets  required by .*closest"),
        ({"crop_aspect": "random", "crop": True}, "photos.crop_aspect_buckets  required by .*random"),
        ({"crop_aspect_buckets": 1.5}, r"photos.crop_aspect_buckets  1.5: .*list"),
        ({"crop_aspect_buckets": [1024]}, "photos.crop_aspect_buckets  .*1024: .*1/32 to 32"),
        ({"crop_aspect_buckets": [0.03]}, "photos.crop_aspect_buckets  .*0.03: .*1/32 to 32"),
        ({"crop_aspect_buckets": ["wide"]}, "photos.crop_aspect_buckets  .*numbers"),
        ({"crop_aspect_buckets": [True]}, "photos.crop_aspect_buckets  .*numbers"),
        ({"crop_aspect_buckets": [{"aspect": 1}]}, "photos.crop_aspect_buckets  .*aspect and weight"),
        ({"crop_aspect_buckets": [{"aspect": 1, "weight": 0.9}]}, "photos.crop_aspect_buckets  .*0.9.*1"),
        (
            {"crop_aspect_buckets": [{"aspect": 1, "weight": -1}]},
            "photos.crop_aspect_buckets  .*-1: .*0",
        ),
        (
            {"crop_aspect_buckets": [1.0, {"aspect": 1, "weight": 1}]},
            "photos.crop_aspect_buckets  .*numbers and objects",
        ),
        ({"max_upscale_threshold": 20}, "photos.max_upscale_threshold  20: .*1"),
        (
            {"crop": True, "maximum_image_size": 2048, "target_downsample_size": 511},
            "photos.target_downsample_size  511 is below resolution 512",
        ),
        (
            {"crop": True, "maximum_image_size": 4, "target_downsample_size": 1024},
            "photos.maximum_image_size  4: .*resolution_type",
        ),
        ({"maximum_image_size": -1}, "photos.maximum_image_size  -1: .* 0"),
        ({"crop_aspect": "squarr"}, 'photos.crop_aspect  "squarr": .*Did you mean square'),
        ({"type": "webshart"}, 'photos.type  "webshart": known from SimpleTuner.*local'),
        ({"type": "huggingface", "instance_data_dir": None}, "photos.dataset_name  required"),
        ({"type": "csv"}, "photos.table_file  required"),
        ({"dataset_type": "conditioning"}, "photos.conditioning_type  required.*Remove the entry"),
        ({"dataset_type": "video"}, 'photos.dataset_type  "video": known from SimpleTuner'),
        ({"caption_strategy": "webshart"}, 'photos.caption_strategy  "webshart": known from .*textfile'),
        ({"caption_strategy": "parquet"}, 'photos.caption_strategy  "table": .*Set parquet'),
        (
            {"caption_strategy": "instanceprompt"},
            'instance_prompt  required by .* "instanceprompt"',
        ),
        ({"only_instance_prompt": True}, "photos.instance_prompt  required by only_instance_prompt"),
        ({"prepend_instance_prompt": True}, "photos.instance_prompt  required by prepend_instance_prompt"),
        ({"resolution": 1.0}, "photos.resolution  1: .*16 to 16384.*resolution_type"),
        ({"resolution": 1024, "resolution_type": "area"}, "photos.resolution  1024 megapixels .*256"),
        ({"caption_column": "text"}, "photos.caption_column  .*belongs to .*table.*local"),
        ({"caption_stratgy": "x"}, "photos.caption_stratgy  unknown key.*caption_strategy"),
        ({"cache_dir": "x"}, "photos.cache_dir  .*text_embeds.*cache_dir_vae"),
        ({"cache_dir_vae": "images/cache"}, "photos.cache_dir_vae  .*instance_data_dir"),
        ({"disabled": "perhaps"}, 'photos.disabled  "perhaps": .*true or false'),
    ],
)
def test_an_invalid_value_of_a_dataset_is_named(
    workspace: Workspace, changes: dict[str, object], pattern: str
) -> None:
    workspace.write()
    assert re.search(pattern, refused(workspace, **changes))


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "", " ", ".hidden", "-x", "a\nb", "x" * 101, "a:b", "a\\b", 3.5]
)
def test_an_id_that_is_no_folder_name_is_refused(workspace: Workspace, name: object) -> None:
    workspace.datasets = [{"id": name, "instance_data_dir": "images"}]
    if isinstance(name, float):
        assert workspace.load().datasets[0].id == "3.5"
    else:
        assert ".id  " in workspace.problems()


@pytest.mark.parametrize("name", ["photos", "my photos-512", "чёрный кот", "a.b_c"])
def test_an_id_may_be_any_folder_name(workspace: Workspace, name: str) -> None:
    assert loaded(workspace, id=name).id == name


def test_two_datasets_of_one_id_are_refused(workspace: Workspace) -> None:
    workspace.image_folder("more")
    workspace.datasets.append({"id": "photos", "instance_data_dir": "more"})
    assert '[1].id  "photos": [0] ' in workspace.problems()


@pytest.mark.parametrize("files", [[], ["note.txt"], [".hidden.png"], ["png"]])
def test_a_folder_without_images_is_refused(workspace: Workspace, files: list[str]) -> None:
    workspace.image_folder("empty", files)
    message = refused(workspace, instance_data_dir="empty")
    assert "photos.instance_data_dir  " in message
    assert ".avif, .bmp, .gif" in message


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a.heic", "b.heic"], "2 images that are .heic: it needs the package pillow-heif"),
        (["a.psd"], "1 image that is .psd: its format is not read"),
        (["a-masklabel.png", "_controls/a.jpg"], "2 images that are named as masks or source images"),
        ([".hidden/a.png"], "holds no image"),
    ],
)
def test_a_folder_of_images_that_cannot_be_trained_on_is_refused_with_the_reason(
    workspace: Workspace, files: list[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "find_spec", lambda _: None)
    folder = workspace.image_folder("other", [])
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    assert found in refused(workspace, instance_data_dir="other")


def test_the_lines_of_captions_are_inherited_and_overridden(workspace: Workspace) -> None:
    assert loaded(workspace).caption_lines == "choose"
    workspace.config["caption_lines"] = "whole"
    assert loaded(workspace).caption_lines == "whole"
    assert loaded(workspace, caption_lines="choose").caption_lines == "choose"
    assert loaded(workspace, disable_multiline_split=False).caption_lines == "choose"


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"disable_multiline_split": True}, "whole"),
        ({"disable_multiline_split": "true", "caption_lines": "whole"}, "whole"),
        ({"--disable_multiline_split": "false"}, "choose"),
        ({"disable_multiline_split": False, "caption_lines": "choose"}, "choose"),
        ({"disable_multiline_split": None}, "choose"),
    ],
)
def test_disable_multiline_split_is_another_spelling_of_caption_lines(
    workspace: Workspace, changes: dict[str, object], lines: str
) -> None:
    assert loaded(workspace, **changes).caption_lines == lines


@pytest.mark.parametrize(("disabled", "lines"), [(True, "choose"), (False, "whole")])
def test_spellings_of_caption_lines_that_contradict_are_an_error_that_lists_both(
    workspace: Workspace, disabled: bool, lines: str
) -> None:
    message = refused(workspace, disable_multiline_split=disabled, caption_lines=lines)
    assert re.search(
        rf'disable_multiline_split  {str(disabled).lower()}: .*caption_lines is "{lines}"', message
    )


def edit_pair(**conditions: object) -> list[object]:
    target = {"id": "photos", "instance_data_dir": "images"}
    return [target, {"id": "before", "instance_data_dir": "images"} | conditions]


@pytest.mark.parametrize("conditions", [{"conditioning_type": "controlnet"}, {"source_dataset_id": "x"}])
@pytest.mark.parametrize("dataset_type", [{}, {"dataset_type": "image"}])
def test_an_entry_that_is_no_training_target_is_to_be_removed(
    workspace: Workspace, conditions: dict[str, object], dataset_type: dict[str, object]
) -> None:
    workspace.datasets = edit_pair(**dataset_type, **conditions)
    message = workspace.problems()
    assert message.startswith("data.json: 1 problem\n")
    assert re.search(r"before\.conditioning_type  .*[Rr]emove the entry.*disabled", message)


@pytest.mark.parametrize("naming", ["before", ["before"], ["other", "before"]])
def test_an_entry_that_another_names_as_its_conditioning_data_is_to_be_removed(
    workspace: Workspace, naming: object
) -> None:
    target, before = edit_pair()
    for entries in (
        [target | {"conditioning_data": naming}, before],
        [before, target | {"conditioning_data": naming}],
    ):
        workspace.datasets = entries
        message = workspace.problems()
        assert re.search(r'before\.id +"before": .*conditioning_data of photos.*Remove the entry', message)
        if naming == ["other", "before"]:
            assert re.search(r'photos\.conditioning_data +"other": .*has this id', message)


def test_conditioning_data_of_a_disabled_entry_is_no_training_target_either(workspace: Workspace) -> None:
    workspace.image_folder("more")
    target, before = edit_pair()
    workspace.datasets = [
        target | {"conditioning_data": "before", "disabled": True},
        before,
        {"id": "more", "instance_data_dir": "more"},
    ]
    assert re.search(r"before\.id  .*Remove the entry", refused_as_is(workspace))
    workspace.datasets[1] = before | {"disabled": True}
    assert [dataset.id for dataset in workspace.load().datasets] == ["more"]


def refused_as_is(workspace: Workspace) -> str:
    message = workspace.problems()
    assert message.startswith("data.json: 1 problem\n"), message
    return message


@pytest.mark.parametrize(
    "conditions", [{"conditioning_type": ""}, {"conditioning_type": None}, {"is_regularisation_data": False}]
)
def test_an_entry_whose_conditioning_is_switched_off_is_trained_on(
    workspace: Workspace, conditions: dict[str, object]
) -> None:
    workspace.datasets = edit_pair(**conditions)
    assert len(workspace.load().datasets) == 2


@pytest.mark.parametrize("key", ["is_regularisation_data", "is_regularization_data"])
def test_regularisation_data_stands_beside_the_subject(workspace: Workspace, key: str) -> None:
    subject, others = edit_pair(**{key: True})
    workspace.datasets = [subject, others]
    run = workspace.load()
    assert [dataset.is_regularisation_data for dataset in run.datasets] == [False, True]
    assert run.regularisation.regularisation_target == "base"
    assert run.regularisation.prior_loss_weight == 1.0
    for datasets in ([others], [others, subject | {"disabled": True}]):
        workspace.datasets = datasets
        assert "is_regularisation_data" in refused_as_is(workspace)


def test_regularisation_data_has_no_instance_prompt_but_its_own(workspace: Workspace) -> None:
    subject, others = edit_pair(is_regularisation_data=True)
    workspace.datasets = [subject, others]
    prompt = "a photo of sks cat"
    assert [each.instance_prompt for each in workspace.load(instance_prompt=prompt).datasets] == [
        prompt,
        None,
    ]
    assert "before.instance_prompt" in workspace.problems(
        instance_prompt=prompt, caption_strategy="instanceprompt"
    )
    workspace.datasets = [subject, others | {"instance_prompt": "a photo of a cat"}]
    found = workspace.load(instance_prompt=prompt, caption_strategy="instanceprompt").datasets
    assert found[1].instance_prompt == "a photo of a cat"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_in_the_base_weights_leaves_no_base_model_to_keep_to(
    workspace: Workspace, start: str
) -> None:
    workspace.datasets = edit_pair(is_regularisation_data=True)
    changes = {"lora_type": "standard", "lora_init_type": start}
    workspace.without("lycoris_config")
    assert "lora_init_type" in workspace.problems(**changes)
    assert workspace.load(**changes, regularisation_target="data").datasets[1].is_regularisation_data
    workspace.datasets = edit_pair()
    assert workspace.load(**changes)


@pytest.mark.parametrize("name", ["a.JPG", "b.webp", "c.jpeg"])
def test_one_image_in_a_subfolder_is_enough(workspace: Workspace, name: str) -> None:
    workspace.image_folder("nested/deep/er", [name])
    assert loaded(workspace, instance_data_dir="nested").instance_data_dir == workspace.folder / "nested"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(workspace: Workspace) -> None:
    folder = workspace.image_folder("closed")
    folder.chmod(0)
    try:
        assert "permissions" in refused(workspace, instance_data_dir="closed")
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("disabled", [True, "true", 1])
def test_a_disabled_entry_is_left_out_unchecked(workspace: Workspace, disabled: object) -> None:
    workspace.datasets.append({"id": "photos", "type": "aws", "nonsense": 1, "disabled": disabled})
    assert [dataset.id for dataset in workspace.load().datasets] == ["photos"]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"id": "a", "instance_data_dir": "images", "disabled": True}],
        [{"id": "t", "dataset_type": "text_embeds"}],
    ],
)
def test_without_an_image_dataset_there_is_nothing_to_train_on(
    workspace: Workspace, entries: list[object]
) -> None:
    workspace.datasets = entries
    assert "image dataset" in workspace.problems()


@pytest.mark.parametrize(("entries", "text"), [([3], "[0]  3: "), ({}, "array")])
def test_an_entry_that_is_no_object_is_refused(workspace: Workspace, entries: object, text: str) -> None:
    workspace.datasets = entries  # type: ignore[assignment]
    assert text in workspace.problems()


# text_embeds entries


def test_a_text_embeds_entry_names_the_text_cache(workspace: Workspace) -> None:
    workspace.datasets.append(
        {
            "id": "texts",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": "{id}/cache",
        }
    )
    config = workspace.load(cache_dir_text="other")
    assert config.data.cache_dir_text == workspace.folder / "texts" / "cache"
    assert [dataset.id for dataset in config.datasets] == ["photos"]


@pytest.mark.parametrize("kind", ["text_embeds", "image_embeds"])
def test_a_cache_in_remote_storage_is_a_local_folder_and_says_so(workspace: Workspace, kind: str) -> None:
    entry = {"id": "t", "dataset_type": kind, "type": "aws", "aws_bucket_name": "b", "cache_dir": "made"}
    workspace.datasets.append(entry)
    config = workspace.load()
    found = {each.key: each.outcome for each in config.decisions if each.key.startswith("t.")}
    if kind == "text_embeds":
        assert config.data.cache_dir_text == workspace.folder / "made"
        assert found == {"t.type": "no effect", "t.aws_bucket_name": "no effect"}
    else:
        assert found == {"t.dataset_type": "no effect"}


def test_of_several_text_embeds_entries_the_default_counts(workspace: Workspace) -> None:
    entry = {"dataset_type": "text_embeds"}
    workspace.datasets += [
        entry | {"id": "a", "cache_dir": "a"},
        entry | {"id": "b", "cache_dir": "b", "default": "true"},
    ]
    assert workspace.load().data.cache_dir_text == workspace.folder / "b"
    workspace.datasets[2] = entry | {"id": "b", "cache_dir": "b"}
    assert "text_embeds entries: a, b." in workspace.problems()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"instance_data_dir": "images"}, "t.instance_data_dir  "),
        ({"cache_dri": "x"}, "t.cache_dri  unknown key. Did you mean cache_dir?"),
        ({"type": "csv"}, 't.type  "csv": '),
        ({"csv": {"path": "x"}}, "t.csv  known from SimpleTuner"),
    ],
)
def test_a_text_embeds_entry_takes_no_other_keys(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    workspace.datasets.append({"id": "t", "dataset_type": "text_embeds"} | changes)
    assert text in workspace.problems()


def test_a_dataset_file_as_other_trainers_write_it_is_read(workspace: Workspace) -> None:
    workspace.datasets = [
        {
            "id": "photos",
            "type": "local",
            "dataset_type": "image",
            "crop": "true",
            "crop_aspect": "square",
            "crop_style": "center",
            "resolution": 512,
            "resolution_type": "pixel_area",
            "minimum_image_size": 256,
            "cache_dir_vae": "cache/vae/{model_family}/photos",
            "instance_data_dir": "images",
            "disabled": False,
            "skip_file_discovery": "",
            "caption_strategy": "filename",
            "metadata_backend": "discovery",
            "repeats": "10",
        },
        {
            "id": "text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": "cache/text/{model_family}",
            "disabled": False,
        },
    ]
    config = workspace.load()
    assert config.datasets[0].repeats == 10
    assert config.data.cache_dir_text == Path(workspace.folder, "cache", "text", "toy")

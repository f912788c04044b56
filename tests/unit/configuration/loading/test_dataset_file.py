"""The dataset json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"instance_data_dir": "nowhere"}, 'photos.instance_data_dir  "nowhere": not found from'),
        ({"instance_data_dir": "config.json"}, "is a file. Give the path of a folder."),
        ({"instance_data_dir": "s3://bucket/x"}, 'instance_data_dir  "s3://bucket/x": remote storage'),
        ({"instance_data_dir": None}, "photos.instance_data_dir  required, but missing."),
        ({"id": None}, "[0].id  required, but missing."),
        ({"repeats": -1}, "photos.repeats  -1: must be at least 0."),
        ({"probability": 0}, "photos.probability  0: must be above 0."),
        ({"crop": "perhaps"}, 'photos.crop  "perhaps": must be true or false.'),
        ({"crop_aspect": "closest"}, "known from SimpleTuner, not supported here. Use square, or preserve"),
        ({"crop_aspect": "squarr"}, "Did you mean square?"),
        ({"type": "huggingface"}, 'photos.type  "huggingface": known from SimpleTuner, not supported here.'),
        ({"dataset_type": "conditioning"}, 'known from SimpleTuner, not supported here. Remove the entry'),
        ({"caption_strategy": "parquet"}, "Write each caption into a text file beside its image"),
        ({"caption_strategy": "instanceprompt"}, 'instance_prompt  required by caption_strategy "instancep'),
        ({"only_instance_prompt": True}, "photos.instance_prompt  required by only_instance_prompt."),
        ({"prepend_instance_prompt": True}, "photos.instance_prompt  required by prepend_instance_prompt."),
        ({"resolution": 1.0}, 'photos.resolution  1: must be from 16 to 16384 pixels. For megapixels set'),
        ({"resolution": 1024, "resolution_type": "area"}, "1024 megapixels is above 256."),
        ({"caption_shuffle": {"enable": True}}, "photos.caption_shuffle  known from SimpleTuner"),
        ({"caption_stratgy": "x"}, "photos.caption_stratgy  unknown key. Did you mean caption_strategy?"),
        ({"cache_dir": "x"}, "belongs to an entry with dataset_type text_embeds. Use cache_dir_vae."),
        ({"cache_dir_vae": "images/cache"}, "lies in instance_data_dir, which is never written to."),
        ({"disabled": "perhaps"}, 'photos.disabled  "perhaps": must be true or false.'),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_do(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    workspace.write()
    assert text in refused(workspace, **changes)


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
    assert '[1].id  "photos": [0] has this id too.' in workspace.problems()


@pytest.mark.parametrize("files", [[], ["note.txt"], [".hidden.png"], ["png"]])
def test_a_folder_without_images_is_refused(workspace: Workspace, files: list[str]) -> None:
    workspace.image_folder("empty", files)
    assert "holds no image (.avif, .bmp" in refused(workspace, instance_data_dir="empty")


@pytest.mark.parametrize("name", ["a.JPG", "b.webp", "c.jpeg"])
def test_one_image_in_a_subfolder_is_enough(workspace: Workspace, name: str) -> None:
    workspace.image_folder("nested/deep/er", [name])
    assert loaded(workspace, instance_data_dir="nested").instance_data_dir == workspace.folder / "nested"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(workspace: Workspace) -> None:
    folder = workspace.image_folder("closed")
    folder.chmod(0)
    try:
        assert "may not be read. Change its permissions." in refused(workspace, instance_data_dir="closed")
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
    assert "no image dataset that is not disabled. Add one." in workspace.problems()


@pytest.mark.parametrize(
    ("entries", "text"), [([3], "[0]  3: must be an object"), ({}, "must hold an array of objects")]
)
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


def test_of_several_text_embeds_entries_the_default_counts(workspace: Workspace) -> None:
    entry = {"dataset_type": "text_embeds"}
    workspace.datasets += [
        entry | {"id": "a", "cache_dir": "a"},
        entry | {"id": "b", "cache_dir": "b", "default": "true"},
    ]
    assert workspace.load().data.cache_dir_text == workspace.folder / "b"
    workspace.datasets[2] = entry | {"id": "b", "cache_dir": "b"}
    assert (
        'several text_embeds entries: a, b. Set "default": true in one of them alone.' in workspace.problems()
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"instance_data_dir": "images"}, "t.instance_data_dir  belongs to an image dataset. Remove it."),
        ({"cache_dri": "x"}, "t.cache_dri  unknown key. Did you mean cache_dir?"),
        ({"type": "aws"}, 't.type  "aws": not supported here.'),
        ({"write_batch_size": 128}, "t.write_batch_size  known from SimpleTuner"),
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

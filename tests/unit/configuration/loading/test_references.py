"""Entries of reference images in the dataset json, and the key that chooses among them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.loading.conditioning import SERVANTS

if TYPE_CHECKING:
    from conftest import Workspace

PHOTOS = {"id": "photos", "instance_data_dir": "images"}
BEFORE = {"id": "before", "instance_data_dir": "before", "conditioning_type": "reference_strict"}
SKETCH = {"id": "sketch", "instance_data_dir": "sketch", "conditioning_type": "reference_loose"}
BOTH = PHOTOS | {SERVANTS: ["before", "sketch"]}
ONE = PHOTOS | {SERVANTS: "before"}


@pytest.fixture(autouse=True)
def editing_family(workspace: Workspace) -> None:
    """A family of which one flavour takes references, and the folders of two entries."""
    toy = workspace.families["toy"]
    editing = replace(toy, reference_flavours=frozenset({"small"}))
    workspace.families = {"toy": editing, "plain": replace(toy, name="plain")}
    for name in ("before", "sketch", "masks"):
        workspace.image_folder(name)


@pytest.mark.parametrize(
    "entries",
    [
        [ONE, BEFORE],
        [BEFORE, PHOTOS | {SERVANTS: ["before"]}],
        [PHOTOS, BEFORE | {"source_dataset_id": "photos"}],
        [ONE, BEFORE | {"dataset_type": "conditioning", "type": "local"}],
        [ONE, BEFORE | {"resolution": 64, "crop": True, "repeats": 3, "cache_dir_vae": "x"}],
    ],
    ids=range(5),
)
def test_references_belong_to_their_images_and_are_no_dataset(
    workspace: Workspace, entries: list[object]
) -> None:
    workspace.datasets = entries
    run = workspace.load()
    assert [(each.id, each.conditioning_data) for each in run.datasets] == [("photos", ("before",))]
    assert [(each.id, each.conditioning_type) for each in run.references] == [("before", "reference_strict")]
    assert run.references[0].instance_data_dir == workspace.folder / "before"
    assert run.references[0].crop is False
    assert run.conditioning == ()


def test_a_mask_and_references_stand_on_one_dataset_in_the_order_of_the_list(workspace: Workspace) -> None:
    masks = {"id": "masks", "instance_data_dir": "masks", "conditioning_type": "mask"}
    workspace.datasets = [PHOTOS | {SERVANTS: ["sketch", "masks", "before"]}, BEFORE, SKETCH, masks]
    run = workspace.load(unmasked_weight=0.1)
    assert run.datasets[0].conditioning_data == ("sketch", "masks", "before")
    assert {each.id for each in run.references} == {"before", "sketch"}
    assert [each.id for each in run.conditioning] == ["masks"]
    assert workspace.dataset_problems(BOTH, BEFORE, SKETCH, unmasked_weight=0.1)  # no mask is left


def test_only_loose_references_have_a_crop_of_their_own(workspace: Workspace) -> None:
    crop = {"crop": True, "crop_style": "centre", "crop_aspect": "closest", "crop_aspect_buckets": [0.5, 2]}
    workspace.datasets = [BOTH, BEFORE | crop, SKETCH | crop | {"resolution": 64}]
    run = workspace.load()
    strict, loose = sorted(run.references, key=lambda each: each.id)
    assert (strict.crop, strict.crop_aspect_buckets) == (False, ())
    assert (loose.crop, loose.crop_style, loose.crop_aspect, loose.crop_aspect_buckets) == (
        True,
        "center",
        "closest",
        (0.5, 2),
    )
    outcomes = {each.key: each.outcome for each in run.decisions}
    assert {f"before.{key}" for key in crop} | {"sketch.resolution"} == {
        key for key, outcome in outcomes.items() if outcome == "no effect"
    }


@pytest.mark.parametrize(
    ("images", "references", "pattern"),
    [
        ({}, {}, r'before\.id +"before": .*conditioning_data'),
        ({SERVANTS: "before"}, {"disabled": True}, r'photos\.conditioning_data +"before": .*disabled'),
        ({SERVANTS: "before"}, {"instance_data_dir": "images"}, r"photos\.conditioning_data .*images"),
        ({SERVANTS: "before"}, {"instance_data_dir": "nowhere"}, r"before\.instance_data_dir"),
        ({SERVANTS: "before"}, {"crop_colour": 1}, r"before\.crop_colour  unknown key"),
        ({SERVANTS: "before"}, {SERVANTS: "photos"}, r'before\.conditioning_data +"photos": '),
        ({SERVANTS: "before"}, {"type": "aws"}, r"before\.aws_bucket_name +required"),
        (
            {SERVANTS: "before"},
            {"conditioning_type": "reference_loose", "crop": True, "crop_aspect": "random"},
            r"before\.crop_aspect_buckets  required",
        ),
    ],
    ids=range(8),
)
def test_a_mistake_in_an_entry_of_references_is_one_problem(
    workspace: Workspace, images: dict[str, object], references: dict[str, object], pattern: str
) -> None:
    found = workspace.dataset_problems(PHOTOS | images, BEFORE | references)
    assert re.search(pattern, found), found


@pytest.mark.parametrize(
    "config", [{"model_family": "plain"}, {"model_flavour": "large"}], ids=["family", "flavour"]
)
def test_a_model_that_sees_no_references_is_refused_with_them(
    workspace: Workspace, config: dict[str, object]
) -> None:
    found = workspace.dataset_problems(ONE, BEFORE, **config)
    assert re.search(r"model_flavour  .*photos.*toy small", found)
    workspace.datasets = [PHOTOS]
    workspace.load()


@pytest.mark.parametrize("sampling", ["random", "combined"])
def test_what_is_resolved_can_be_read_again(workspace: Workspace, sampling: str) -> None:
    captions = {} if sampling == "combined" else {"captions": ["sharpen", "restore"]}
    crop = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 2]}
    workspace.datasets = [BOTH, BEFORE | captions, SKETCH | crop]
    first = workspace.load(conditioning_multidataset_sampling=sampling)
    resolved = first.resolved()
    assert resolved["conditioning_multidataset_sampling"] == sampling
    workspace.config = json.loads(json.dumps(resolved))
    second = workspace.load()
    assert (second.datasets, second.references) == (first.datasets, first.references)
    assert [each for each in second.decisions if each.key.startswith("before.")] == []


def test_an_unknown_way_to_choose_is_refused(workspace: Workspace) -> None:
    found = workspace.dataset_problems(BOTH, BEFORE, SKETCH, conditioning_multidataset_sampling="both")
    assert re.search(r'conditioning_multidataset_sampling  "both": .*random.*combined', found)


@pytest.mark.parametrize("captions", ["sharpen", ["sharpen"]], ids=["text", "list"])
def test_captions_of_references_are_for_random(workspace: Workspace, captions: object) -> None:
    workspace.datasets = [BOTH, BEFORE | {"captions": captions}, SKETCH | {"captions": False}]
    assert [each.captions for each in workspace.load().references] == [("sharpen",), ()]
    found = workspace.dataset_problems(*workspace.datasets, conditioning_multidataset_sampling="combined")
    assert re.search(r'conditioning_multidataset_sampling  "combined": .*before', found)


INSTANCE_PROMPT = {"caption_strategy": "instanceprompt", "instance_prompt": "sharpen"}


def test_the_instance_prompt_of_one_of_several_entries_is_its_caption(workspace: Workspace) -> None:
    workspace.datasets = [BOTH, BEFORE | INSTANCE_PROMPT, SKETCH]
    assert [each.captions for each in workspace.load().references] == [("sharpen",), ()]


@pytest.mark.parametrize(
    "captions", [INSTANCE_PROMPT, {"caption_strategy": "textfile"}], ids=["instanceprompt", "textfile"]
)
def test_captions_of_a_single_entry_are_not_read_as_in_simpletuner(
    workspace: Workspace, captions: dict[str, object]
) -> None:
    workspace.datasets = [ONE, BEFORE | captions]
    run = workspace.load()
    assert run.references[0].captions == ()
    outcomes = {each.key: each.outcome for each in run.decisions}
    assert outcomes["before.caption_strategy"] == "no effect"


def test_text_files_of_one_of_several_entries_are_refused(workspace: Workspace) -> None:
    found = workspace.dataset_problems(BOTH, BEFORE | {"caption_strategy": "textfile"}, SKETCH)
    assert re.search(r'before\.caption_strategy  "textfile": .*captions', found)


def test_output_is_not_written_among_the_references(workspace: Workspace) -> None:
    found = workspace.dataset_problems(ONE, BEFORE, output_dir=str(workspace.folder / "before" / "run"))
    assert re.search(r"output_dir .*dataset before", found)


@pytest.mark.parametrize(
    ("written", "kinds"),
    [
        ({"type": "canny"}, ["canny"]),
        ([{"type": "edges"}, {"type": "lowres"}], ["canny", "superresolution"]),
        ([{"type": "inpainting"}, {"type": "jpeg"}], ["random_masks", "jpeg_artifacts"]),
        ({"type": "depth_midas", "model": "before"}, ["depth"]),
        (False, []),
        ([], []),
    ],
    ids=range(6),
)
def test_references_are_made_by_their_names_in_simpletuner(
    workspace: Workspace, written: object, kinds: list[str]
) -> None:
    workspace.datasets = [PHOTOS | {"conditioning": written}]
    (dataset,) = workspace.load().datasets
    assert [each.type for each in dataset.conditioning] == kinds
    assert all(each.conditioning_type == "reference_strict" for each in dataset.conditioning)


def test_params_stand_for_keys_beside_them_and_what_is_off_is_left_out(workspace: Workspace) -> None:
    made = {"type": "jpeg_artifacts", "params": {"quality": 30}, "enhance_blocks": False, "captions": ["x"]}
    made |= {"compression_rounds": None}
    workspace.datasets = [PHOTOS | {"conditioning": made | {"conditioning_type": "reference_strict"}}]
    first = workspace.load()
    (found,) = first.datasets[0].conditioning
    assert found.model_dump(include={"quality", "captions"}) == {"quality": 30, "captions": ("x",)}
    workspace.config = json.loads(json.dumps(first.resolved()))
    assert workspace.load().datasets == first.datasets


@pytest.mark.parametrize(
    ("made", "pattern"),
    [
        ({"type": "segmentation"}, r"photos\.conditioning .*'segmentation': .*canny"),
        ({"type": "depth_midas"}, r"photos\.conditioning.*model  required"),
        ({"type": "depth", "model": "nowhere"}, r'photos\.conditioning.*model  "nowhere"'),
        ({"captions": "x"}, r"photos\.conditioning .*None: .*canny"),
        ("canny", r"photos\.conditioning .*objects"),
        ({"type": "canny", "low": 1}, r"photos\.conditioning.*low  unknown key"),
        ({"type": "jpeg", "enhance_blocks": True}, r"photos\.conditioning.*enhance_blocks  unknown key"),
        (
            {"type": "canny", "conditioning_type": "controlnet"},
            r'photos\.conditioning.*conditioning_type  "controlnet": .*reference_strict',
        ),
        ({"type": "canny", "low_threshold": 200}, r"high_threshold  100 .*200"),
        ({"type": "random_masks", "min_coverage": 0.9}, r"max_coverage  0\.5 .*0\.9"),
        ({"type": "jpeg", "quality_range": [30, 10]}, r"quality_range  30 .*10"),
        ({"type": "jpeg", "quality": 0}, r"quality  0: "),
    ],
    ids=range(12),
)
def test_a_mistake_in_a_made_reference_is_one_problem(
    workspace: Workspace, made: object, pattern: str
) -> None:
    found = workspace.dataset_problems(PHOTOS | {"conditioning": made})
    assert re.search(pattern, found), found


def test_made_references_need_a_model_that_sees_them(workspace: Workspace) -> None:
    found = workspace.dataset_problems(PHOTOS | {"conditioning": {"type": "canny"}}, model_family="plain")
    assert re.search(r"model_flavour  .*photos.*toy small", found)


def test_captions_of_made_references_are_for_random(workspace: Workspace) -> None:
    made = [{"type": "canny"}, {"type": "jpeg", "captions": "restore"}]
    found = workspace.dataset_problems(
        PHOTOS | {"conditioning": made}, conditioning_multidataset_sampling="combined"
    )
    assert re.search(r'conditioning_multidataset_sampling  "combined": .*jpeg_artifacts of photos', found)

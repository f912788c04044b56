"""Entries of masks in the dataset json, and the keys of config.json that act on masks."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices.losses import LOSSES, Loss
from simpletuner.helpers.configuration.simpletuner_run import translate_run

if TYPE_CHECKING:
    from conftest import Workspace

PHOTOS = {"id": "photos", "instance_data_dir": "images"}
MASKS = {"id": "masks", "instance_data_dir": "masks", "conditioning_type": "mask"}


@pytest.fixture(autouse=True)
def mask_folder(workspace: Workspace) -> None:
    workspace.image_folder("masks")


@pytest.mark.parametrize(
    "entries",
    [
        [PHOTOS | {"conditioning_data": "masks"}, MASKS],
        [MASKS, PHOTOS | {"conditioning_data": ["masks"]}],
        [PHOTOS, MASKS | {"source_dataset_id": "photos"}],
        [PHOTOS | {"conditioning_data": "masks"}, MASKS | {"source_dataset_id": "photos"}],
        [PHOTOS | {"conditioning_data": "masks"}, MASKS | {"dataset_type": "conditioning", "type": "local"}],
        [
            PHOTOS | {"conditioning_data": "masks"},
            MASKS | {"resolution": 64, "crop": True, "caption_strategy": "filename", "cache_dir_vae": "x"},
        ],
    ],
    ids=range(6),
)
def test_masks_condition_their_images_and_are_no_dataset(workspace: Workspace, entries: list[object]) -> None:
    workspace.datasets = entries
    run = workspace.load()
    assert [(each.id, each.conditioning_data) for each in run.datasets] == [("photos", ("masks",))]
    assert [(each.id, each.conditioning_type) for each in run.conditioning] == [("masks", "mask")]
    assert run.conditioning[0].instance_data_dir == workspace.folder / "masks"


def test_an_entry_that_is_named_twice_is_an_error(workspace: Workspace) -> None:
    entries = [PHOTOS | {"conditioning_data": ["masks", "masks"]}, MASKS]
    found = workspace.dataset_problems(*entries)
    assert re.search(r'photos\.conditioning_data +"masks": named more than once', found)


def test_masks_serve_several_datasets(workspace: Workspace) -> None:
    workspace.image_folder("more")
    more = {"id": "more", "instance_data_dir": "more", "conditioning_data": "masks"}
    workspace.datasets = [PHOTOS, more, MASKS | {"source_dataset_id": "photos"}]
    assert [each.conditioning_data for each in workspace.load().datasets] == [("masks",), ("masks",)]


def test_keys_of_images_in_an_entry_of_masks_have_no_effect(workspace: Workspace) -> None:
    workspace.datasets = [PHOTOS | {"conditioning_data": "masks"}, MASKS | {"crop": True, "resolution": 64}]
    outcomes = {each.key: each.outcome for each in workspace.load().decisions}
    assert outcomes["masks.crop"] == outcomes["masks.resolution"] == "no effect"


@pytest.mark.parametrize(
    ("images", "masks", "pattern"),
    [
        ({}, {}, r'masks\.id +"masks": .*conditioning_data'),
        ({}, {"source_dataset_id": "photoz"}, r'masks\.source_dataset_id +"photoz": .*photos'),
        (
            {"conditioning_data": "masks", "alpha_mask": True},
            {},
            r"photos\.conditioning_data +masks: .*alpha_mask",
        ),
        (
            {"conditioning_data": "masks"},
            {"disabled": True},
            r'photos\.conditioning_data +"masks": .*disabled',
        ),
        (
            {"conditioning_data": "masks"},
            {"conditioning_data": "photos"},
            r'masks\.conditioning_data +"photos": ',
        ),
        ({"conditioning_data": "masks"}, {"dataset_type": "image"}, r'masks\.dataset_type +"image": '),
        (
            {"conditioning_data": "masks"},
            {"conditioning_type": "masque"},
            r'conditioning_type +"masque": .*mask.*reference_strict.*reference_loose',
        ),
        (
            {"conditioning_data": "masks"},
            {"conditioning_type": "controlnet"},
            r'conditioning_type +"controlnet": known from SimpleTuner.*reference_strict',
        ),
        (
            {"conditioning_data": "masks"},
            {"instance_data_dir": "images"},
            r"photos\.conditioning_data .*images",
        ),
        ({"conditioning_data": "masks"}, {"instance_data_dir": "nowhere"}, r"masks\.instance_data_dir"),
        ({"conditioning_data": "masks"}, {"crop_colour": 1}, r"masks\.crop_colour  unknown key"),
    ],
    ids=range(11),
)
def test_a_mistake_in_an_entry_of_masks_is_one_problem(
    workspace: Workspace, images: dict[str, object], masks: dict[str, object], pattern: str
) -> None:
    found = workspace.dataset_problems(PHOTOS | images, MASKS | masks)
    assert re.search(pattern, found), found


def test_an_id_that_no_entry_has_is_named(workspace: Workspace) -> None:
    found = workspace.dataset_problems(PHOTOS | {"conditioning_data": "mask"})
    assert re.search(r'photos\.conditioning_data +"mask": no entry', found)
    found = workspace.dataset_problems(PHOTOS | {"conditioning_data": ["masks", "other"]}, MASKS)
    assert re.search(r'photos\.conditioning_data +"other": no entry', found)


def test_an_image_has_one_mask(workspace: Workspace) -> None:
    workspace.image_folder("more")
    more = MASKS | {"id": "more", "instance_data_dir": "more"}
    found = workspace.dataset_problems(PHOTOS | {"conditioning_data": ["masks", "more"]}, MASKS, more)
    assert re.search(r"photos\.conditioning_data +masks, more: ", found)


def test_masks_without_images_are_no_run(workspace: Workspace) -> None:
    found = workspace.dataset_problems(MASKS | {"source_dataset_id": "photos"}, number=2)
    assert "no enabled image dataset" in found


def test_a_folder_without_images_is_no_folder_of_masks(workspace: Workspace) -> None:
    (workspace.folder / "empty").mkdir()
    entry = MASKS | {"instance_data_dir": "empty"}
    found = workspace.dataset_problems(PHOTOS | {"conditioning_data": "masks"}, entry)
    assert re.search(r"masks\.instance_data_dir .*holds no image", found)


def test_masks_of_a_disabled_entry_are_left_out(workspace: Workspace) -> None:
    workspace.image_folder("more")
    others = {"id": "more", "instance_data_dir": "more"}
    workspace.datasets = [PHOTOS | {"conditioning_data": "masks", "disabled": True}, MASKS, others]
    run = workspace.load()
    assert [each.id for each in run.datasets] == ["more"]
    assert run.conditioning == ()


def test_what_is_resolved_can_be_read_again(workspace: Workspace) -> None:
    kind = {"conditioning_type": "segmentation"}
    workspace.datasets = [PHOTOS | {"conditioning_data": "masks"}, MASKS | kind]
    keys = {
        "unmasked_weight": 0.25,
        "normalize_masked_area_loss": True,
        "masked_loss_probability": 0.5,
    }
    first = workspace.load(**keys)
    resolved = first.resolved()
    assert {key: resolved[key] for key in keys} == keys
    workspace.config = json.loads(json.dumps(resolved))
    second = workspace.load()
    assert (second.datasets, second.conditioning) == (first.datasets, first.conditioning)
    assert second.masks == first.masks


@pytest.mark.parametrize(
    ("key", "value"),
    [("unmasked_weight", 0.1), ("normalize_masked_area_loss", True), ("masked_loss_probability", 0.9)],
)
def test_a_key_of_masks_without_masks_is_refused(workspace: Workspace, key: str, value: object) -> None:
    assert re.search(rf"{key} +.*without masks", workspace.dataset_problems(PHOTOS, **{key: value}))


def test_a_mistake_in_the_entry_of_masks_is_not_named_twice(workspace: Workspace) -> None:
    entries = [PHOTOS | {"conditioning_data": "masks"}, MASKS | {"instance_data_dir": "nowhere"}]
    keys = {"unmasked_weight": 0.1, "normalize_masked_area_loss": True}
    assert "nowhere" in workspace.dataset_problems(*entries, **keys)
    entries = [PHOTOS | {"conditioning_data": "nothing"}]
    assert "nothing" in workspace.dataset_problems(*entries, **keys)


def test_the_defaults_of_the_keys_of_masks_need_no_masks(workspace: Workspace) -> None:
    workspace.datasets = [PHOTOS]
    workspace.load(unmasked_weight=0, normalize_masked_area_loss=False, masked_loss_probability=1.0)


@pytest.mark.parametrize(
    "entries",
    [[PHOTOS | {"conditioning_data": "masks"}, MASKS], [PHOTOS | {"alpha_mask": True}]],
    ids=["mask", "alpha"],
)
def test_masked_loss_probability_is_for_segmentation(workspace: Workspace, entries: list[object]) -> None:
    assert re.search(
        r"masked_loss_probability .*segmentation",
        workspace.dataset_problems(*entries, masked_loss_probability=0.5),
    )


@pytest.mark.parametrize("value", [-0.1, 1.1])
@pytest.mark.parametrize("key", ["unmasked_weight", "masked_loss_probability"])
def test_weights_and_probabilities_are_shares(workspace: Workspace, key: str, value: float) -> None:
    entries = [PHOTOS | {"alpha_mask": True}]
    assert key in workspace.dataset_problems(*entries, **{key: value})


@pytest.mark.parametrize("masked", [{"alpha_mask": True}, {"conditioning_data": "masks"}, {}])
def test_a_loss_that_takes_no_mask_is_refused_with_masks(
    workspace: Workspace, masked: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Loss(name="plain", summary="Takes no mask.", build="outside:loss")
    monkeypatch.setitem(LOSSES, "plain", record)
    workspace.datasets = [PHOTOS | masked, *([MASKS] if "conditioning_data" in masked else [])]
    if not masked:
        assert workspace.load(loss_type="plain").noise.loss_type == "plain"
        return
    workspace.config |= {"loss_type": "plain"}
    assert re.search(r'loss_type +"plain": .*l2, huber, smooth_l1', workspace.problems())
    assert workspace.load(loss_type="huber").noise.loss_type == "huber"


def test_output_is_not_written_among_the_masks(workspace: Workspace) -> None:
    entries = [PHOTOS | {"conditioning_data": "masks"}, MASKS]
    found = workspace.dataset_problems(*entries, output_dir=str(workspace.folder / "masks" / "run"))
    assert re.search(r"output_dir .*dataset masks", found)


def test_masks_of_a_simpletuner_run_stay(workspace: Workspace) -> None:
    workspace.datasets = [PHOTOS | {"conditioning_data": "masks"}, MASKS]
    run = translate_run(workspace.write(), families=workspace.families)
    assert [entry["id"] for entry in run.datasets] == ["photos", "masks"]
    assert run.datasets[0]["conditioning_data"] == "masks"


def test_the_name_of_an_entry_that_is_left_out_is_left_out(workspace: Workspace) -> None:
    kind = {"conditioning_type": "controlnet"}
    workspace.datasets = [PHOTOS | {"conditioning_data": "masks"}, MASKS | kind]
    run = translate_run(workspace.write(), families=workspace.families)
    assert [entry["id"] for entry in run.datasets] == ["photos"]
    assert "conditioning_data" not in run.datasets[0]
    assert "photos.conditioning_data" in {
        each.key for each in run.decisions if each.outcome == "not translated"
    }

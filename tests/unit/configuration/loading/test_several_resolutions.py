"""A list as the resolution of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace


def entry(name: str = "cats", **keys: object) -> dict[str, object]:
    return {"id": name, "instance_data_dir": "images", **keys}


def test_a_list_makes_a_dataset_of_each_size(workspace: Workspace) -> None:
    workspace.datasets = [entry(resolution=[256, "512"], repeats=2, write_batch_size=1), entry("dogs")]
    run = workspace.load()
    found = [(each.id, each.resolution, each.repeats) for each in run.datasets]
    assert found == [("cats-256", 256, 2), ("cats-512", 512, 2), ("dogs", 512, 0)]
    assert len({run.data.latents_folder(each) for each in run.datasets}) == 3
    lines = [(each.key, each.ours) for each in run.decisions if each.key.startswith("cats")]
    assert lines == [("cats.resolution", "datasets cats-256, cats-512"), ("cats.write_batch_size", "")]


def test_a_list_of_areas_and_a_list_of_one(workspace: Workspace) -> None:
    workspace.datasets = [
        entry(resolution=[0.25, 1.0], resolution_type="area"),
        entry("dogs", resolution=[64]),
    ]
    assert [each.id for each in workspace.load().datasets] == ["cats-0.25", "cats-1", "dogs"]


def test_each_size_has_what_conditions_the_entry(workspace: Workspace) -> None:
    (workspace.folder / "masks").mkdir()
    (workspace.folder / "masks" / "a.png").write_bytes((workspace.folder / "images" / "a.png").read_bytes())
    mask = {"id": "masks", "instance_data_dir": "masks", "conditioning_type": "mask"}
    workspace.datasets = [
        entry(resolution=[256, 512]),
        mask | {"source_dataset_id": "cats"},
        entry("dogs", resolution=[256, 512], conditioning_data="masks"),
    ]
    run = workspace.load()
    assert [each.conditioning_data for each in run.datasets] == [("masks",)] * 4
    assert [each.id for each in run.conditioning] == ["masks"]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([], "must not be empty"),
        ([256, 256], "makes a dataset cats-256, and [0] makes one too"),
        ([256, "big"], '"big": must be a number'),
        ([256, 0], "must be above 0"),
        ([256, [512]], "must be a number"),
        ([256, None], "must be a number"),
    ],
    ids=["empty", "twice", "text", "zero", "nested", "null"],
)
def test_a_bad_list_is_named_at_its_entry(workspace: Workspace, sizes: list[object], text: str) -> None:
    message = workspace.dataset_problems(entry(resolution=sizes), entry("dogs"))
    assert "cats.resolution" in message
    assert text in message


@pytest.mark.parametrize("order", [1, -1], ids=["after", "before"])
def test_an_id_that_another_entry_has_is_refused(workspace: Workspace, order: int) -> None:
    entries = [entry(resolution=[256, 512]), entry("cats-512")][::order]
    message = workspace.dataset_problems(*entries)
    assert "cats-512" in message
    assert "[0] " in message


def test_a_problem_of_all_sizes_is_named_once(workspace: Workspace) -> None:
    message = workspace.dataset_problems(entry(resolution=[256, 512], repeats=-1), entry("dogs"))
    assert "cats.repeats" in message


def test_a_list_is_no_resolution_of_config_json(workspace: Workspace) -> None:
    assert "resolution" in workspace.problems(resolution=[256, 512])

"""A run that goes back to an earlier checkpoint goes on from there, and says what it leaves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from simpletuner.helpers.checkpointing.branch import Branch, load_branch, save_branch
from simpletuner.helpers.checkpointing.checkpoints import branch_from, current_checkpoints
from simpletuner.helpers.configuration.schema.sections import CheckpointConfig
from simpletuner.helpers.errors import CheckpointError, NothingToResumeError
from simpletuner.helpers.io.faults import at_crash_points
from simpletuner.helpers.io.run_folder import BRANCH_FILE
from tests.unit.checkpointing.test_checkpoints import Killed, find, make, names, save


def start(folder: Path, resume_from: str, *steps: int, **keys: object) -> int:
    """One start of a run that saves at these steps; the step it went on from."""
    keys = {"checkpoints_total_limit": None, **keys}
    config = CheckpointConfig(output_dir=str(folder), resume_from_checkpoint=resume_from, **keys)
    found = find(folder, resume_from_checkpoint=resume_from, **keys)
    assert found is not None
    branch = branch_from(found, config)
    save_branch(folder, branch)
    checkpoints = make(folder, **keys)
    checkpoints.branch, checkpoints.saved_step = branch, found.step
    save(checkpoints, *steps)
    return found.step


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3, 6 and 9."""
    save(make(tmp_path), 3, 6, 9)
    return tmp_path


def test_the_same_command_goes_on_from_the_checkpoint_that_it_saved(folder: Path) -> None:
    assert start(folder, "checkpoint-3") == 3
    assert start(folder, "checkpoint-3", 5) == 3, "nothing was saved yet"
    assert start(folder, "checkpoint-3", 7) == 5, "not from 6 and 9, which it left"
    assert start(folder, "checkpoint-3") == 7
    assert start(folder, "latest") == 7


def test_a_name_with_an_exclamation_mark_goes_back_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(folder, "checkpoint-3", 5)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert start(folder, "checkpoint-3!") == 3
    assert "checkpoint-9, checkpoint-6, checkpoint-5" in caplog.text
    assert "Remove the !" in caplog.text
    assert start(folder, "checkpoint-3") == 3, "it has saved nothing since it went back again"


def test_another_name_begins_another_branch(folder: Path) -> None:
    start(folder, "checkpoint-3", 5, 7)
    assert start(folder, "checkpoint-5", 8) == 5
    assert start(folder, "checkpoint-5") == 8
    assert load_branch(folder) == Branch(start=5, saved=(8,))
    assert start(folder, "checkpoint-3") == 3


def test_what_was_left_is_reached_by_its_name_and_latest_stays_with_it(folder: Path) -> None:
    start(folder, "checkpoint-3", 5)
    assert start(folder, "checkpoint-9", 10) == 9
    assert start(folder, "latest") == 10
    assert [each.step for each in current_checkpoints(folder)] == [10, 9, 6, 5, 3]


def test_latest_before_a_branch_has_saved_anything_is_the_newest_of_all(folder: Path) -> None:
    start(folder, "checkpoint-3")
    assert start(folder, "latest", 10) == 9
    assert load_branch(folder) is None
    assert start(folder, "checkpoint-3") == 3, "10 was not made from 3"


def test_latest_names_the_newer_checkpoints_that_the_run_left(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(folder, "checkpoint-3", 7)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert start(folder, "latest") == 7
    assert "leaves checkpoint-9" in caplog.text
    assert [each.step for each in current_checkpoints(folder)] == [7, 3]


def test_damaged_checkpoints_of_a_branch_are_passed_over_to_its_start(folder: Path) -> None:
    start(folder, "checkpoint-3", 5, 7)
    (folder / "checkpoint-7" / "state").write_text("other")
    assert start(folder, "checkpoint-3") == 5
    (folder / "checkpoint-5" / "state").write_text("other")
    assert start(folder, "checkpoint-3") == 3
    assert load_branch(folder) == Branch(start=3), "nothing of the damaged ones is in its past"


def test_latest_stays_on_a_branch_of_which_only_the_start_is_intact(folder: Path) -> None:
    start(folder, "checkpoint-3", 5)
    (folder / "checkpoint-5" / "state").write_text("other")
    assert start(folder, "latest", 7) == 3
    assert start(folder, "latest") == 7, "not 9, which it left"


def test_a_step_that_is_saved_again_is_listed_once_and_in_order() -> None:
    assert Branch(3, (5, 9)).with_saved(7).with_saved(5) == Branch(3, (5, 7, 9))


@pytest.mark.parametrize("limit", [1, 2])
def test_the_named_checkpoint_is_kept_until_the_run_has_saved_its_own(folder: Path, limit: int) -> None:
    keys = {"checkpoints_total_limit": limit}
    assert start(folder, "checkpoint-3", **keys) == 3
    assert (folder / "checkpoint-3").is_dir()
    assert start(folder, "checkpoint-3", 5, **keys) == 3
    assert start(folder, "checkpoint-3", 7, 8, **keys) == 5
    own = ["checkpoint-7", "checkpoint-8"][-limit:]
    assert names(folder) == sorted([BRANCH_FILE, *own])
    assert start(folder, "checkpoint-3", **keys) == 8


def test_the_checkpoint_just_saved_is_kept_beside_a_damaged_one_of_a_later_step(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "checkpoint-9" / "state").write_text("other")
    with caplog.at_level(logging.WARNING):
        assert start(folder, "latest", 7, checkpoints_total_limit=1) == 6
    assert names(folder) == ["checkpoint-7", "checkpoint-9"]
    assert "checkpoint-9" in caplog.text
    assert "leaves" not in caplog.text, "a run leaves checkpoints by a name alone"


def test_a_run_that_dies_while_it_saves_its_first_checkpoint_can_go_on(folder: Path) -> None:
    for stage in ("folder.before_rename", "folder.after_rename", "file.before_rename", "checkpoint.pruning"):

        def die(name: str, stage: str = stage) -> None:
            if name == stage:
                raise Killed

        save_branch(folder, None)
        save(make(folder), 3, 6, 9)
        start(folder, "checkpoint-3", checkpoints_total_limit=1)
        with pytest.raises(Killed), at_crash_points(die):
            start(folder, "checkpoint-3", 5, checkpoints_total_limit=1)
        assert start(folder, "checkpoint-3", checkpoints_total_limit=1) in (3, 5)


def test_a_pruned_checkpoint_is_missing_for_a_branch_of_another_start(folder: Path) -> None:
    start(folder, "checkpoint-3", 10, checkpoints_total_limit=1)
    with pytest.raises(NothingToResumeError, match="checkpoint-6"):
        find(folder, resume_from_checkpoint="checkpoint-6")


def test_pruning_says_what_it_removes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        save(make(folder, checkpoints_total_limit=2), 12)
    assert str(folder / "checkpoint-3") in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"start": 3}', '{"start": 3, "saved": 5}', '{"start": "x"}'])
def test_a_damaged_branch_file_is_ignored_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    start(folder, "checkpoint-3", 5)
    (folder / BRANCH_FILE).write_text(content)
    with caplog.at_level(logging.WARNING):
        assert load_branch(folder) is None
    assert BRANCH_FILE in caplog.text


def test_a_branch_whose_checkpoints_are_all_damaged_is_an_error(folder: Path) -> None:
    start(folder, "checkpoint-3", 5)
    for step in (3, 5):
        (folder / f"checkpoint-{step}" / "state").write_text("other")
    for resume_from in ("latest", "checkpoint-3"):
        with pytest.raises(CheckpointError, match="damaged"):
            find(folder, resume_from_checkpoint=resume_from)

"""Checkpoints on disk: complete or absent, found by their content, pruned, refused when of another run."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from simpletuner.helpers.checkpointing.checkpoints import (
    Checkpoint,
    Checkpoints,
    check_compatible,
    differing_fields,
    find_checkpoint,
    list_checkpoints,
    remove_unfinished,
)
from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.configuration.schema.sections import CheckpointConfig
from simpletuner.helpers.errors import CheckpointError, NothingToResumeError
from simpletuner.helpers.io.atomic import verify_manifest
from simpletuner.helpers.io.faults import StorageError, at_crash_points
from simpletuner.helpers.io.run_folder import COMPATIBILITY_FILE, CONFIG_FILE

SETTINGS = {"lycoris linear_dim": 8, "optimizer": "adamw"}
CONTENT = "the state of step {step}"


@dataclass
class State:
    """A run's state whose only file says its step."""

    progress: Progress = field(default_factory=Progress)
    is_sharded: bool = False
    saved_to: list[Path] = field(default_factory=list)
    num_bytes: int = 100

    def save(self, folder: Path) -> None:
        self.saved_to.append(folder)
        (folder / "state").write_text(CONTENT.format(step=self.progress.step))


def make(
    folder: Path, *, state: State | None = None, is_main_process: bool = True, **keys: object
) -> Checkpoints:
    return Checkpoints(
        config=CheckpointConfig(output_dir=str(folder), **keys),
        state=state or State(),
        compatibility={"settings": SETTINGS, "weights": {"base weights": "aa"}},
        resolved={"seed": 1},
        is_main_process=is_main_process,
    )


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.state.progress.step = step
        checkpoints.save()


def find(folder: Path, **keys: object) -> Checkpoint | None:
    return find_checkpoint(CheckpointConfig(output_dir=str(folder), **keys), settings=SETTINGS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saved_checkpoint_verifies_and_holds_state_settings_and_configuration(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    folder = tmp_path / "checkpoint-3"
    assert verify_manifest(folder) == []
    assert names(folder) == sorted([COMPATIBILITY_FILE, CONFIG_FILE, "manifest.json", "state"])
    assert json.loads((folder / CONFIG_FILE).read_bytes()) == {"seed": 1}


@pytest.mark.parametrize(("interval", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_checkpoint_is_due_at_its_interval(tmp_path: Path, interval: int, due: list[int]) -> None:
    checkpoints = make(tmp_path, checkpoint_step_interval=interval)
    assert [step for step in range(1, 7) if checkpoints.is_due(step)] == due


def test_limit_keeps_the_newest_by_step(tmp_path: Path) -> None:
    save(make(tmp_path, checkpoints_total_limit=2), 2, 4, 10, 12)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12"]


def test_saving_the_same_step_again_writes_nothing(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    save(checkpoints, 3)
    before = (tmp_path / "checkpoint-3" / "state").stat().st_ino
    save(checkpoints, 3)
    assert (tmp_path / "checkpoint-3" / "state").stat().st_ino == before


def test_latest_is_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    save(make(tmp_path), 10, 9)
    found = find(tmp_path)
    assert found is not None
    assert found.step == 10


def test_latest_in_an_empty_folder_starts_anew(tmp_path: Path) -> None:
    assert find(tmp_path / "missing") is None


@pytest.mark.parametrize("file", ["state", COMPATIBILITY_FILE, CONFIG_FILE, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.reliability_row(6)
def test_damaged_checkpoint_is_passed_over_for_the_previous_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    save(make(tmp_path), 3, 6)
    path = tmp_path / "checkpoint-6" / file
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if damage == "flip" else data[:-1])
    if file == "manifest.json" and damage == "truncate":
        path.write_bytes(data[: len(data) // 2])  # its last byte is a line break that means nothing
    with caplog.at_level(logging.WARNING):
        found = find(tmp_path)
    assert found is not None
    assert found.step == 3
    assert "checkpoint-6" in caplog.text


@pytest.mark.reliability_row(6)
def test_folder_without_any_intact_checkpoint_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    (tmp_path / "checkpoint-3" / "state").write_text("other")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        find(tmp_path)


def test_named_checkpoint_is_taken_though_a_newer_one_exists(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(make(tmp_path), 3, 6)
    found = find(tmp_path, resume_from_checkpoint="checkpoint-3")
    assert found is not None
    assert found.step == 3
    assert "checkpoint-6" in caplog.text


def test_named_checkpoint_that_is_missing_is_refused_naming_those_that_are_there(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    with pytest.raises(NothingToResumeError, match=r"checkpoint-4.*checkpoint-3") as info:
        find(tmp_path, resume_from_checkpoint="checkpoint-4")
    assert info.value.exit_code == 3


def test_named_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    (tmp_path / "checkpoint-3" / "state").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-3.*state"):
        find(tmp_path, resume_from_checkpoint="checkpoint-3")


def test_starting_anew_on_top_of_checkpoints_is_refused(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    with pytest.raises(CheckpointError, match=r"checkpoint-3.*resume_from_checkpoint"):
        find(tmp_path, resume_from_checkpoint="none")


@pytest.mark.reliability_row(9)
def test_checkpoint_of_other_settings_is_refused_field_by_field(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    config = CheckpointConfig(output_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"linear_dim +8 .*16") as info:
        find_checkpoint(config, settings={"lycoris linear_dim": 16, "optimizer": "adamw"})
    assert "optimizer" not in str(info.value)


@pytest.mark.reliability_row(9)
def test_checkpoint_of_another_base_model_is_refused(tmp_path: Path) -> None:
    save(make(tmp_path), 3)
    found = find(tmp_path)
    assert found is not None
    check_compatible(found, "weights", {"base weights": "aa"})
    with pytest.raises(CheckpointError, match=r"base weights +'aa' .*'bb'"):
        check_compatible(found, "weights", {"base weights": "bb"})


def test_difference_names_fields_that_only_one_side_has() -> None:
    assert differing_fields({"a": 1, "c": 3}, {"a": 1, "bb": 2}) == [
        "bb  None in the checkpoint, 2 in the configuration",
        "c   3 in the checkpoint, None in the configuration",
    ]


class Killed(BaseException):
    """Stands for the end of the process."""


def crash_points_of_a_save(folder: Path) -> list[str]:
    passed: list[str] = []
    with at_crash_points(passed.append):
        save(make(folder, checkpoints_total_limit=1), 3, 6)
    return list(dict.fromkeys(passed))


def test_checkpoint_that_cannot_be_removed_now_is_a_warning_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = make(tmp_path, checkpoints_total_limit=1)
    save(checkpoints, 3)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "checkpoint-3":
            raise PermissionError(errno.EACCES, "in use", str(path))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        save(checkpoints, 6)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert "checkpoint-3 cannot be removed now: in use" in caplog.text
    save(checkpoints, 9)
    assert names(tmp_path) == ["checkpoint-9"]


@pytest.mark.reliability_row(2)
def test_save_that_dies_at_any_stage_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    stages = crash_points_of_a_save(tmp_path / "stages")
    assert {"folder.before_manifest", "folder.before_rename", "checkpoint.pruning"} <= set(stages)
    for stage in stages:
        folder = tmp_path / stage
        checkpoints = make(folder, checkpoints_total_limit=1)
        save(checkpoints, 3)

        def die(name: str, stage: str = stage) -> None:
            if name == stage:
                raise Killed

        with pytest.raises(Killed), at_crash_points(die):
            save(checkpoints, 6)
        remove_unfinished(folder)
        found = find(folder)
        assert found is not None
        assert (found.path / "state").read_text() == CONTENT.format(step=found.step)
        assert all(name.startswith("checkpoint-") for name in names(folder))


@pytest.mark.reliability_row(5)
def test_write_that_fails_keeps_the_old_checkpoint_and_leaves_no_half_one(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    save(checkpoints, 3)

    def fail(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise CheckpointError("no space left")

    checkpoints.state.save = fail
    with pytest.raises(CheckpointError):
        save(checkpoints, 6)
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("free", [50, 100])
@pytest.mark.reliability_row(5)
def test_full_disk_says_bytes_needed_and_free_and_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Before anything is written when the room is known to be too small, and else while it is written."""
    checkpoints = make(tmp_path)
    save(checkpoints, 3)

    begun: list[Path] = []

    def fail(folder: Path) -> None:
        begun.append(folder)
        (folder / "state").write_text("half")
        raise OSError(errno.ENOSPC, "full")

    checkpoints.state.save = fail
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000 - free, free))
    with pytest.raises(StorageError, match=rf"checkpoint-6: .*{free} bytes free, 100 bytes needed"):
        save(checkpoints, 6)
    assert len(begun) == (free == 100)
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_other_processes_publish_nothing_and_help_to_save_a_sharded_state(
    tmp_path: Path, is_sharded: bool
) -> None:
    state = State(is_sharded=is_sharded)
    save(make(tmp_path, state=state, is_main_process=False), 3, 3)
    assert len(state.saved_to) == is_sharded
    assert not names(tmp_path)
    assert not any(folder.exists() for folder in state.saved_to)


def test_list_ignores_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-x", "checkpoint-3.bak", "validation"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2]

"""A finished run told to run again: known by its files, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.helpers.errors import CheckpointError, DataError, MissingDependencyError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, EXIT_FILE, SUMMARY_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.run_summary import FinishedRun
from simpletuner.helpers.training import finished
from simpletuner.helpers.training.finished import find_finished
from tests.integration.tiny_runs import TinyRun

STEPS = 2
AGAIN = """
import sys
from simpletuner.train import main
code = main()
print(code, "torch" in sys.modules, "huggingface_hub" in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run that has reached its end."""
    run = TinyRun(tmp_path_factory.mktemp("finished"), keys={"max_train_steps": STEPS})
    assert run.run() == 0
    return run


def found(run: TinyRun, **overrides: object) -> FinishedRun | None:
    return find_finished(run.config(**overrides), registry.specs())


def test_a_finished_run_ends_without_torch(run: TinyRun) -> None:
    run.config()  # writes the files
    (run.output_dir / EXIT_FILE).unlink(missing_ok=True)
    leftover = run.output_dir / ".partial_other_1_00000000"
    leftover.touch()
    before = (run.output_dir / SUMMARY_FILE).read_bytes()
    command = [sys.executable, "-c", AGAIN, "--config", str(run.folder / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False", "False"]
    assert f"This run is finished: step {STEPS} of {STEPS}" in done.stderr
    assert (run.output_dir / SUMMARY_FILE).read_bytes() == before
    assert json.loads((run.output_dir / EXIT_FILE).read_bytes())["exit_code"] == 0
    assert not leftover.exists()


def test_fewer_steps_and_epochs_are_finished_too(run: TinyRun) -> None:
    shorter, epochs = found(run, max_train_steps=1), {"max_train_steps": None, "num_train_epochs": 1}
    assert shorter is not None
    assert (shorter.summary.step, shorter.max_steps) == (STEPS, 1)
    assert found(run, **epochs, train_batch_size=3) is not None
    assert found(run, **epochs, train_batch_size=1) is None, "three images are three steps"


def test_more_steps_are_not_finished(run: TinyRun) -> None:
    assert found(run, max_train_steps=STEPS + 1) is None


@pytest.mark.parametrize("chosen", ["none", f"checkpoint-{STEPS}"])
def test_another_resume_is_decided_by_the_whole_start(run: TinyRun, chosen: str) -> None:
    assert found(run, resume_from_checkpoint=chosen) is None


def test_several_processes_decide_together(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert found(run) is None


def test_another_configuration_is_refused(run: TinyRun) -> None:
    with pytest.raises(CheckpointError, match="optimizer"):
        found(run, optimizer="lion")


def test_a_missing_package_is_named(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_config: object) -> None:
        raise MissingDependencyError("no such package")

    monkeypatch.setattr(finished, "check_packages", missing)
    with pytest.raises(MissingDependencyError):
        found(run)


def test_a_folder_in_use_is_refused(run: TinyRun) -> None:
    with run_lock(run.output_dir), pytest.raises(StorageError, match="in use"):
        found(run)


def _of(name: str) -> Callable[[TinyRun], Path]:
    return lambda run: run.output_dir / name


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param(_of(ADAPTER_FILE), None, id="adapter gone"),
        pytest.param(_of(ADAPTER_FILE), b"", id="adapter damaged"),
        pytest.param(_of(f"checkpoint-{STEPS}/optimizer.safetensors"), b"", id="checkpoint damaged"),
        pytest.param(_of(SUMMARY_FILE), b"{", id="summary damaged"),
        pytest.param(lambda run: run.folder / "images" / "image1.png", b"", id="image damaged"),
    ],
)
def test_damage_is_left_to_the_whole_start(
    run: TinyRun, file: Callable[[TinyRun], Path], content: bytes | None
) -> None:
    path = file(run)
    before = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        if "checkpoint" in path.parent.name:
            with pytest.raises(CheckpointError, match="damaged"):
                found(run)
        else:
            assert found(run) is None
    finally:
        path.write_bytes(before)
    assert found(run) is not None


def test_data_that_a_run_refuses_is_left_to_the_whole_start(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise DataError("no image is left")

    monkeypatch.setattr(finished, "preview_datasets", refuse)
    assert found(run) is None

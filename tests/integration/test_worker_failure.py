"""A loader thread that fails and a process that is killed end the run; what was saved stays whole."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.errors import DataError
from tests.integration.tiny_runs import TinyRun, start_pair, wait_for_steps

pytestmark = pytest.mark.reliability_row(31)


def test_error_in_the_loader_thread_ends_the_run_naming_the_image_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"checkpoint_step_interval": 1, "max_train_steps": 6}
    whole, run = TinyRun(tmp_path / "whole", keys=keys), TinyRun(tmp_path / "run", keys=keys)
    assert whole.run() == 0
    with run.trainer() as trainer:
        train_step = trainer.train_step

        def lose_the_cache(*arguments: object) -> object:
            for file in (run.folder / "cache" / "vae").rglob("*.safetensors"):
                file.unlink()
            return train_step(*arguments)

        monkeypatch.setattr(trainer, "train_step", lose_the_cache)
        with pytest.raises(DataError, match=r"image\d\.png.*'pictures'"):
            trainer.run()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert 1 <= len(run.log()) < 6, "the thread is one batch ahead"
    assert run.run() == 0
    assert run.log() == whole.log()


def test_killed_process_of_two_ends_the_other_with_an_error(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keys={"max_train_steps": 100_000, "checkpoint_step_interval": 0})
    main, other = start_pair(run)
    wait_for_steps(run, 2, process=main)
    other.kill()
    assert main.wait() not in (0, EXIT_PREEMPTED), main.errors()
    assert re.search(rf"TrainingError: Rank 0 .*rank 1 \(process {other.pid} ", main.errors()), main.errors()

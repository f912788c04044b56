"""A loader thread that fails and a process that is killed end the run; what was saved stays whole."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.caching.latents import read_latents
from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.data import cache_reader
from simpletuner.helpers.errors import DataError
from tests.integration import processes
from tests.integration.tiny_runs import TinyRun, start_pair, wait_for_steps

HANGING_COMMAND = """
import sys
from simpletuner import train
from simpletuner.helpers.data import cache_reader
from tests.integration.test_worker_failure import HangingCache
cache_reader.read_latents = HangingCache(2)
sys.exit(train.main(["--config", sys.argv[1]]))
"""

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
            for file in (run.folder / "cache" / "vae").rglob("shard-*.safetensors"):
                file.write_bytes(b"")
            return train_step(*arguments)

        monkeypatch.setattr(trainer, "train_step", lose_the_cache)
        with pytest.raises(DataError, match=r"image\d\.png.*'pictures'"):
            trainer.run()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert 1 <= len(run.log()) < 6, "the thread is one batch ahead"
    assert run.run() == 0
    assert run.log() == whole.log()


class HangingCache:
    """Reads latents until the read number `at`, which acts and never ends."""

    def __init__(self, at: int, *, act: Callable[[], object] = bool) -> None:
        self.at, self.act = at, act
        self.released = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.at -= 1
        if self.at == 0:
            self.act()
            self.released.wait()
        return read_latents(*arguments)


@pytest.mark.reliability_row(3)
def test_signal_is_honoured_while_the_loader_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"checkpoint_step_interval": 0, "gradient_accumulation_steps": 2}
    whole, run = TinyRun(tmp_path / "whole", keys=keys), TinyRun(tmp_path / "run", keys=keys)
    assert whole.run() == 0
    with monkeypatch.context() as patched:
        # In the second micro-batch of step 2: its first one is trained on again.
        hanging = HangingCache(4, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
        patched.setattr(cache_reader, "read_latents", hanging)
        assert run.run() == EXIT_PREEMPTED
        hanging.released.set()
    assert [path.name for path in run.output_dir.glob("checkpoint-*")] == ["checkpoint-1"]
    assert run.run() == 0
    assert run.log() == whole.log()


def test_loader_that_hangs_ends_the_process_at_its_limit_after_a_checkpoint(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keys={"loader_timeout_seconds": 0.5, "checkpoint_step_interval": 0})
    run.config()
    script = tmp_path / "hangs.py"
    script.write_text(HANGING_COMMAND)
    process = processes.start(script, run.folder / "config.json")
    assert process.wait() == 1, process.errors()
    assert "loader_timeout_seconds: 0.5" in process.errors()
    assert re.search(r"image\d\.png \(dataset 'pictures'\)", process.errors())
    assert [path.name for path in run.output_dir.glob("checkpoint-*")] == ["checkpoint-1"]


def test_killed_process_of_two_ends_the_other_with_an_error(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keys={"max_train_steps": 100_000, "checkpoint_step_interval": 0})
    main, other = start_pair(run)
    wait_for_steps(run, 2, process=main)
    other.kill()
    assert main.wait() not in (0, EXIT_PREEMPTED), main.errors()
    assert re.search(rf"TrainingError: Rank 0 .*rank 1 \(process {other.pid} ", main.errors()), main.errors()

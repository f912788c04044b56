"""SIGTERM, SIGUSR1, SIGINT and SIGHUP at every stage of a run: a checkpoint, code 75, and nothing lost."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.caching.shards import read_index
from simpletuner.helpers.checkpointing.checkpoints import Checkpoints
from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED, Preempted
from simpletuner.helpers.io.faults import at_crash_points
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.reporting.html_report.writer import RunPage
from simpletuner.helpers.training.trainer import STOP_WAIT_S
from tests.integration.test_validation import PICTURES
from tests.integration.tiny_runs import TinyRun, reset_accelerate, start_pair, wait_for_steps

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path / "stopped")


def expected(**keys: object) -> str:
    """The digest of the same run when nothing stops it."""
    return _digest(tuple(keys.items()))


@functools.cache
def _digest(keys: tuple[tuple[str, object], ...]) -> str:
    return finish(TinyRun(Path(tempfile.mkdtemp(prefix="whole_"))), **dict(keys))


def signal_at(call: int, *, number: signal.Signals, then: Callable[..., Any]) -> Callable[..., Any]:
    """`then`, with a signal to this process just before its `call`-th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return then(*args, **kwargs)

    return wrapped


def finish(run: TinyRun, **keys: object) -> str:
    with run.trainer(**keys) as trainer:
        assert trainer.run() == 0
        return trainer.state_digest()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.reliability_row(3)
def test_signal_in_mid_step_saves_and_ends_resumable(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    keys = {"checkpoint_step_interval": 0}
    with run.trainer(**keys) as trainer:
        before = signal.getsignal(number)
        then = trainer.family.predict
        monkeypatch.setattr(trainer.family, "predict", signal_at(2, number=number, then=then))
        assert trainer.run() == EXIT_PREEMPTED
        assert trainer.progress.step == 2  # the step in which the signal came
        assert trainer.trackers._timeout_s == STOP_WAIT_S
        assert signal.getsignal(number) != before
    assert (run.output_dir / "checkpoint-2").is_dir()
    assert finish(run, **keys) == expected(**keys)


@pytest.mark.reliability_row(3)
def test_a_stop_saves_the_checkpoint_before_the_page_is_written(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    with run.trainer(checkpoint_step_interval=0, validation_step_interval=2) as trainer:
        then, save, refresh = trainer.family.predict, Checkpoints.save, RunPage.refresh
        monkeypatch.setattr(trainer.family, "predict", signal_at(2, number=signal.SIGTERM, then=then))
        monkeypatch.setattr(Checkpoints, "save", lambda each: (events.append("save"), save(each)))
        monkeypatch.setattr(RunPage, "refresh", lambda each: (events.append("page"), refresh(each)))
        assert trainer.run() == EXIT_PREEMPTED
    assert events[:3] == ["page", "save", "page"]  # the first page is that of the start


@pytest.mark.reliability_row(3)
def test_signal_while_accumulating_waits_for_the_optimiser_step(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"gradient_accumulation_steps": 3, "checkpoint_step_interval": 0}
    with run.trainer(**keys) as trainer:
        then = trainer.family.predict
        monkeypatch.setattr(trainer.family, "predict", signal_at(4, number=signal.SIGTERM, then=then))
        assert trainer.run() == EXIT_PREEMPTED
        assert (trainer.progress.step, trainer.progress.samples) == (2, 6)
    assert finish(run, **keys) == expected(**keys)


@pytest.mark.reliability_row(3)
def test_signal_while_saving_finishes_the_checkpoint(run: TinyRun) -> None:
    def send(name: str) -> None:
        if name == "folder.before_manifest":
            os.kill(os.getpid(), signal.SIGTERM)

    with run.trainer() as trainer, at_crash_points(send):
        assert trainer.run() == EXIT_PREEMPTED
        assert trainer.progress.step == 2
    assert finish(run) == expected()


@pytest.mark.reliability_row(3)
def test_signal_while_validating_ends_at_once_and_the_pictures_are_made_later(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**PICTURES, "disable_benchmark": True}
    with run.trainer(**keys) as trainer:
        then = trainer.family.pipeline_inputs
        monkeypatch.setattr(trainer.family, "pipeline_inputs", signal_at(1, number=signal.SIGTERM, then=then))
        assert trainer.run() == EXIT_PREEMPTED
        assert trainer.progress.step == 2
        assert trainer.denoiser.training
    grid = run.output_dir / "validation" / "step-2" / "grid.png"
    assert not grid.exists()
    assert finish(run, **keys) == expected(**keys)
    assert grid.is_file()


@pytest.mark.reliability_row(3)
def test_signal_in_the_last_validation_leaves_the_run_unfinished(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**PICTURES, "disable_benchmark": True, "max_train_steps": 1}
    with run.trainer(**keys) as trainer:
        then = trainer.family.pipeline_inputs
        monkeypatch.setattr(trainer.family, "pipeline_inputs", signal_at(1, number=signal.SIGTERM, then=then))
        assert trainer.run() == EXIT_PREEMPTED
    assert (run.output_dir / "pytorch_lora_weights.safetensors").is_file()
    assert run.run(**keys) == 0
    assert (run.output_dir / "validation" / "step-1" / "grid.png").is_file()


@pytest.mark.reliability_row(3)
def test_signal_before_the_first_step_ends_without_a_checkpoint(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.trainer(**PICTURES) as trainer:
        then = trainer.family.make_pipeline
        monkeypatch.setattr(trainer.family, "make_pipeline", signal_at(1, number=signal.SIGINT, then=then))
        assert trainer.run() == EXIT_PREEMPTED
    assert not list(run.output_dir.glob("checkpoint-*"))
    assert run.run() == 0


@pytest.mark.parametrize(("encoder", "cache"), [("encode_images", "vae"), ("encode_prompts", "text")])
@pytest.mark.reliability_row(3)
def test_signal_while_caching_ends_at_once_and_keeps_what_is_encoded(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, encoder: str, cache: str
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patched:
        then = getattr(SDXL, encoder)
        patched.setattr(SDXL, encoder, signal_at(2, number=signal.SIGTERM, then=then))
        with pytest.raises(Preempted) as info:
            run.run(vae_batch_size=1)
    assert info.value.exit_code == EXIT_PREEMPTED
    shards = (run.folder / "cache" / cache).rglob("shard-*.safetensors")
    assert sum(len(read_index(shard)) for shard in shards) == 2  # of 3
    assert [signal.getsignal(number) for number in SIGNALS] == before
    reset_accelerate()
    assert run.run() == 0


@pytest.mark.reliability_row(3)
def test_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keys={"max_train_steps": 100_000, "checkpoint_step_interval": 0})
    main, other = start_pair(run)
    wait_for_steps(run, 3, process=main)
    other.terminate()
    assert [each.wait() for each in (main, other)] == [EXIT_PREEMPTED] * 2, main.errors()
    steps = len(run.log())
    assert (run.output_dir / f"checkpoint-{steps}").is_dir(), main.errors()
    assert run.log()[-1]["samples"] == 2 * steps

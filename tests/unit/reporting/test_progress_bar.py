"""Counters of a run, and how they are shown without a terminal."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.io.run_folder import PROGRESS_FILE
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.reporting.progress_bar import ProgressDisplay, duration


def record(step: int, *, rank: float | None = 7.25) -> StepMetrics:
    """A step's record with round numbers."""
    return StepMetrics(
        step=step,
        epoch=0,
        loss=0.5,
        lr=1e-4,
        grad_norm=1.0,
        mean_active_rank=rank,
        samples=step,
        seconds=0.1,
        loss_by_band={},
        memory_mib=100.0,
        device_memory_mib=None,
    )


def test_progress_survives_a_round_trip() -> None:
    progress = Progress()
    progress.advance(samples=3)
    progress.advance(samples=3)
    restored = Progress()
    restored.load_state_dict(progress.state_dict())
    assert restored == Progress(step=2, samples=6)


@pytest.mark.parametrize(("step", "shown"), [(10, True), (11, False), (12, True)])
def test_display_without_a_terminal_logs_some_steps_and_the_last(
    caplog: pytest.LogCaptureFixture, step: int, shown: bool
) -> None:
    with caplog.at_level(logging.INFO), ProgressDisplay(total_steps=12, step=9) as display:
        display.update(record(step))
    assert (f"Step {step}/12  loss 0.5000  lr 1.00e-04  rank 7.2" in caplog.text) is shown


def test_display_that_is_disabled_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressDisplay(total_steps=10, step=0, enabled=False) as display:
        display.update(record(10))
    assert caplog.text == ""


def terminal_of(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("simpletuner.helpers.reporting.progress_bar.terminal", lambda: Console(stderr=True))


def test_display_on_a_terminal_shows_loss_rate_and_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal_of(120, monkeypatch)
    with ProgressDisplay(total_steps=4, step=0) as display:
        display.update(record(2, rank=None))
    shown = capsys.readouterr().err
    assert "2/4" in shown
    assert "loss 0.5000  lr 1.00e-04" in shown
    assert "rank" not in shown


@pytest.mark.reliability_row(3)
def test_run_whose_terminal_is_closed_ends_as_any_other() -> None:
    script = (
        "from simpletuner.helpers.reporting.progress_bar import ProgressDisplay\n"
        "with ProgressDisplay(total_steps=2, step=0) as display:\n"
        "    print('shown', flush=True)\n"
        "    input()\n"
    )
    terminal, its_other_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=its_other_end, stderr=its_other_end
    )
    os.close(its_other_end)
    shown = b""
    while b"shown" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


def test_the_bar_names_the_validation_image_and_is_cleared_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal_of(80, monkeypatch)
    with ProgressDisplay(total_steps=4, step=0) as display, display.image(3, 8):
        display._bar.refresh()  # type: ignore[union-attr]  # as its thread does
    shown = capsys.readouterr().err
    assert "validation image 3 of 8" in shown
    assert shown.endswith("\x1b[2K"), "the last thing written erases the bar's line"


def test_without_a_terminal_images_are_logged_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 11.0, 11.0, 11.0, 12.0, 12.0, 13.0, 14.0, 15.0])
    monkeypatch.setattr("simpletuner.helpers.reporting.progress_bar.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        display = ProgressDisplay(total_steps=4, step=2)
        for number in (1, 2):
            with display.image(number, 8):
                pass
    assert "Step 2/4  validation image 1 of 8" in caplog.text
    assert "image 2 of 8" not in caplog.text


def test_the_time_left_counts_the_images_of_validations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr("simpletuner.helpers.reporting.progress_bar.time.monotonic", lambda: now)
    display = ProgressDisplay(total_steps=110, step=0, images_left=lambda step: 3 if step == 10 else 0)
    with display.image(1, 1):
        now += 20.0
    with caplog.at_level(logging.INFO):
        display.update(record(10))  # 0.1 s a step
    assert "1 min 10 s left" in caplog.text


def test_step_and_time_left_are_written_every_five_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("simpletuner.helpers.reporting.progress_bar.time.monotonic", lambda: clock[-1])

    def progress() -> dict[str, object]:
        content: dict[str, object] = json.loads((tmp_path / PROGRESS_FILE).read_bytes())
        return content

    with ProgressDisplay(total_steps=110, step=3, output_dir=tmp_path) as display:
        assert progress() == {"step": 3, "left_s": None}
        for now_s, shown in ((104.9, 3), (105.0, 20), (109.0, 20), (110.0, 40)):
            clock.append(now_s)
            display.update(record(20 if now_s < 110 else 40))
            assert progress()["step"] == shown
        assert progress()["left_s"] == pytest.approx(7.0)
        display.update(record(50))
    assert progress()["step"] == 50


def test_other_processes_write_no_progress(tmp_path: Path) -> None:
    with ProgressDisplay(total_steps=4, step=0, enabled=False, output_dir=tmp_path) as display:
        display.update(record(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text

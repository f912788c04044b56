"""Progress of a run on the terminal, or as log lines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from simpletuner.helpers.io.logs import leave_closed_terminal, terminal
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.reporting.run_state import save_progress
from simpletuner.helpers.reporting.smoothing import RunningMean

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LINES = 10
SECONDS_BETWEEN_IMAGE_LINES = 10.0
SECONDS_BETWEEN_FILES = 5.0


def _no_images(_step: int) -> int:
    return 0


class ProgressDisplay:
    """Shows a progress bar on a terminal, which it clears at the end; elsewhere logs a line every few steps.

    A context manager. Disabled, on all processes but the main one, it does nothing.

    Args:
        total_steps: Optimiser steps of the whole run.
        step: Steps taken so far.
        enabled: Whether to show anything.
        images_left: Number of validation images that a run still generates after a step.
        output_dir: Of the run, which gets a file with the step and the time left.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        step: int,
        enabled: bool = True,
        images_left: Callable[[int], int] = _no_images,
        output_dir: Path | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._step = step
        self._images_left = images_left
        self._loss = RunningMean()
        self._seconds = RunningMean()
        self._image_seconds = RunningMean()
        self._seconds_per_image = 0.0
        self._logged_s = time.monotonic()
        self._output_dir = output_dir if enabled else None
        self._saved_s = -math.inf
        self._left_s: float | None = None
        self._enabled = enabled
        self._bar: Progress | None = None
        self._task = TaskID(0)
        console = terminal()
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("step", total=total_steps, completed=step, numbers="")

    def __enter__(self) -> Self:
        self._save()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            leave_closed_terminal()  # a run under nohup or disown outlives its terminal
            self._bar.stop()
        self._save()

    def update(self, metrics: StepMetrics) -> None:
        """Show one optimiser step."""
        if not self._enabled:
            return
        self._step = metrics.step
        loss, seconds = self._loss.update(metrics.loss), self._seconds.update(metrics.seconds)
        left_s = seconds * (self.total_steps - metrics.step)
        left_s += self._seconds_per_image * self._images_left(metrics.step)
        self._left_s = left_s
        self._save(after_s=SECONDS_BETWEEN_FILES)
        rank = "" if metrics.mean_active_rank is None else f"  rank {metrics.mean_active_rank:.1f}"
        numbers = f"loss {loss:.4f}  lr {metrics.lr:.2e}{rank}"
        if self._bar:
            text = f"{numbers}  {duration(left_s)} left"
            self._bar.update(self._task, completed=metrics.step, numbers=text)
        elif metrics.step % STEPS_BETWEEN_LINES == 0 or metrics.step == self.total_steps:
            logger.info("Step %d/%d  %s  %s left", metrics.step, self.total_steps, numbers, duration(left_s))

    @contextmanager
    def image(self, number: int, total: int) -> Iterator[None]:
        """Show which validation image is generated inside the context, and measure its time."""
        if self._enabled:
            self._save(after_s=SECONDS_BETWEEN_FILES)
            self._show_image(f"validation image {number} of {total}")
        started_s = time.monotonic()
        yield
        self._seconds_per_image = self._image_seconds.update(time.monotonic() - started_s)

    def _save(self, *, after_s: float = 0.0) -> None:
        if self._output_dir is not None and time.monotonic() - self._saved_s >= after_s:
            save_progress(self._output_dir, step=self._step, left_s=self._left_s)
            self._saved_s = time.monotonic()

    def _show_image(self, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, numbers=text)
        elif time.monotonic() - self._logged_s >= SECONDS_BETWEEN_IMAGE_LINES:
            self._logged_s = time.monotonic()
            logger.info("Step %d/%d  %s", self._step, self.total_steps, text)


def duration(seconds: float) -> str:
    """A time in its two largest units: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

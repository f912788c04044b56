"""Progress of a run on the terminal, or as log lines."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from simpletuner.helpers.io.logs import leave_closed_terminal
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.reporting.smoothing import RunningMean

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LINES = 10


class ProgressDisplay:
    """Shows a progress bar on a terminal; elsewhere logs a line every few steps.

    A context manager. Disabled, on all processes but the main one, it does nothing.
    """

    def __init__(self, *, total_steps: int, step: int, enabled: bool = True) -> None:
        self.total_steps = total_steps
        self._loss = RunningMean()
        self._seconds = RunningMean()
        self._enabled = enabled
        self._bar: Progress | None = None
        self._task = TaskID(0)
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("step", total=total_steps, completed=step, numbers="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            leave_closed_terminal()  # a run under nohup or disown outlives its terminal
            self._bar.stop()

    def update(self, metrics: StepMetrics) -> None:
        """Show one optimiser step."""
        if not self._enabled:
            return
        loss, seconds = self._loss.update(metrics.loss), self._seconds.update(metrics.seconds)
        rank = "" if metrics.mean_active_rank is None else f"  rank {metrics.mean_active_rank:.1f}"
        numbers = f"loss {loss:.4f}  lr {metrics.lr:.2e}{rank}"
        if self._bar:
            self._bar.update(self._task, completed=metrics.step, numbers=numbers)
        elif metrics.step % STEPS_BETWEEN_LINES == 0 or metrics.step == self.total_steps:
            left_s = seconds * (self.total_steps - metrics.step)
            logger.info("Step %d/%d  %s  %.0f s left", metrics.step, self.total_steps, numbers, left_s)

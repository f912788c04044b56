"""Where a run stands, and how that is shown."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.reporting.metrics import StepRecord
from simpletuner.helpers.reporting.smoothing import Smoothed

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LINES = 10


@dataclass(slots=True)
class Progress:
    """The counters that a checkpoint keeps."""

    step: int = 0
    """Optimiser steps taken."""
    samples: int = 0
    """Seen by all processes."""

    def advance(self, *, samples: int) -> None:
        """Count one optimiser step over `samples` samples of all processes."""
        self.step += 1
        self.samples += samples

    def state_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counters over."""
        self.step, self.samples = state["step"], state["samples"]

    def micro_step(self, *, global_batch: int) -> int:
        """The micro-batch that comes next, for `global_batch` samples in one micro-batch of all processes.

        Raises:
            CheckpointError: The samples seen so far are no whole number of such micro-batches.
        """
        micro_step, rest = divmod(self.samples, global_batch)
        if rest:
            fitting = [str(size) for size in range(1, 65) if self.samples % size == 0]
            raise CheckpointError(
                f"The checkpoint has seen {self.samples} samples, which {global_batch} (processes x "
                f"train_batch_size) does not divide. Resume with one of: {', '.join(fitting)}."
            )
        return micro_step


class ProgressDisplay:
    """Shows a run on the terminal, or as a log line every few steps when there is none.

    A context manager; disabled (on all processes but the main one) it does nothing.
    """

    def __init__(self, *, total_steps: int, step: int, enabled: bool = True) -> None:
        self.total_steps = total_steps
        self._loss = Smoothed()
        self._seconds = Smoothed()
        self._enabled = enabled
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[measured]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("step", total=total_steps, completed=step, measured="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, record: StepRecord) -> None:
        """Show one optimiser step."""
        if not self._enabled:
            return
        loss, seconds = self._loss.update(record.loss), self._seconds.update(record.seconds)
        rank = "" if record.mean_active_rank is None else f"  rank {record.mean_active_rank:.1f}"
        measured = f"loss {loss:.4f}  lr {record.lr:.2e}{rank}"
        if self._bar:
            self._bar.update(self._task, completed=record.step, measured=measured)
        elif record.step % STEPS_BETWEEN_LINES == 0 or record.step == self.total_steps:
            left_s = seconds * (self.total_steps - record.step)
            logger.info("Step %d/%d  %s  %.0f s left", record.step, self.total_steps, measured, left_s)

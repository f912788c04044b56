"""What an optimiser step measured, from its micro-batches on the device to one record on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from simpletuner.helpers.contracts import Batch, StepStats


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the training log."""

    step: int
    epoch: int
    loss: float
    """Mean over the micro-batches and the processes."""
    lr: float
    grad_norm: float | None
    """Before clipping; None when it overflowed and the gradient scaler skipped the step."""
    mean_active_rank: float | None
    samples: int
    """Seen since the run began, by all processes."""
    seconds: float
    """Of this optimiser step, without checkpoints and validations."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The host's view of one optimiser step, read from the device in a single transfer."""

    loss: float
    grad_norm: float
    active_rank: float | None
    stop: bool
    """Some process was asked to stop."""


@dataclass(slots=True)
class Window:
    """The micro-batches since the last optimiser step."""

    batches: list[Batch] = field(default_factory=list)
    stats: list[StepStats] = field(default_factory=list)

    def add(self, batch: Batch, stats: StepStats) -> None:
        """Take in one micro-batch."""
        self.batches.append(batch)
        self.stats.append(stats)

    def clear(self) -> None:
        """Begin the next optimiser step."""
        self.batches.clear()
        self.stats.clear()

    def measure(self, accelerator: Accelerator, *, grad_norm: Tensor, stop: bool, step: int) -> Measured:
        """Average over micro-batches and processes, and read the result; `grad_norm` is a scalar.

        Raises:
            TrainingError: A loss or the gradient is not finite (with a gradient scaler, only a loss:
                it skips steps of overflowed gradients itself).
        """
        losses = torch.stack([stats.loss for stats in self.stats])  # [micro-batches]
        ranks = [stats.active_rank for stats in self.stats if stats.active_rank is not None]
        rank = sum(ranks) / len(ranks) if ranks else math.nan
        shared = torch.cat([losses.mean()[None], losses.new_tensor([rank, float(stop)])])
        shared = accelerator.reduce(shared, reduction="mean")
        values = torch.cat([shared, grad_norm.to(losses)[None], losses]).tolist()
        loss, rank, stopping, norm = values[:4]
        self._refuse_non_finite(values[4:], loss=loss, step=step)
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise TrainingError(
                f"Step {step}: the gradient is not finite (norm {norm}). Trained on: {self._described()}. "
                "No step was taken; lower learning_rate, or look at these samples."
            )
        return Measured(
            loss=loss, grad_norm=norm, active_rank=None if math.isnan(rank) else rank, stop=stopping > 0
        )

    def _refuse_non_finite(self, losses: list[float], *, loss: float, step: int) -> None:
        bad = [index for index, value in enumerate(losses) if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"Step {step}: the loss is {losses[bad[0]]}. Trained on: {self._described(bad)}. "
                "No step was taken; lower learning_rate, or look at these samples."
            )
        if not math.isfinite(loss):
            raise TrainingError(
                f"Step {step}: the loss of another process is not finite; its own message names the samples."
            )

    def _described(self, indices: list[int] | None = None) -> str:
        chosen = range(len(self.batches)) if indices is None else indices
        return "; ".join(
            f"{sample.dataset_id}/{sample.path} at timestep {timestep}"
            for index in chosen
            for sample, timestep in zip(self.batches[index].samples, self.stats[index].timesteps, strict=True)
        )


@dataclass(slots=True)
class Smoothed:
    """A running mean that follows new values slowly; early values are averaged evenly."""

    keep: float = 0.95
    """Weight of the past, in [0, 1)."""
    _total: float = 0.0
    _weight: float = 0.0

    def update(self, value: float) -> float:
        """Take in `value` and return the mean."""
        self._total = self.keep * self._total + (1.0 - self.keep) * value
        self._weight = self.keep * self._weight + (1.0 - self.keep)
        return self._total / self._weight

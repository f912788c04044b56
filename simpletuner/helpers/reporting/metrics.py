"""What an optimiser step measured, from its micro-batches on the device to one record on the host."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.reporting.noise_bands import BANDS, band_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from simpletuner.helpers.contracts import Batch, MicroBatchOutput


@dataclass(frozen=True, slots=True)
class StepMetrics:
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
    loss_by_band: Mapping[str, float | None]
    """Mean over the samples of each band of timesteps, of all processes; None for a band without a sample."""
    memory_mib: float
    """Most main memory that the main process held so far."""
    device_memory_mib: float | None
    """Most GPU memory that its tensors held so far; None without a CUDA GPU."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The host's view of one optimiser step, read from the device in a single transfer."""

    loss: float
    grad_norm: float
    active_rank: float | None
    loss_by_band: Mapping[str, float | None]
    stop: bool
    """Some process was asked to stop."""


@dataclass(slots=True)
class StepAccumulator:
    """The micro-batches since the last optimiser step."""

    batches: list[Batch] = field(default_factory=list)
    stats: list[MicroBatchOutput] = field(default_factory=list)

    def add(self, batch: Batch, stats: MicroBatchOutput) -> None:
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
        shared = torch.cat([losses.mean()[None], losses.new_tensor([rank, float(stop)]), self._by_band()])
        shared = accelerator.reduce(shared, reduction="mean")
        values = torch.cat([shared, grad_norm.to(losses)[None], losses]).tolist()
        (loss, rank, stopping), bands = values[:3], values[3 : 3 + 2 * len(BANDS)]
        norm, *own = values[3 + 2 * len(BANDS) :]
        self._refuse_non_finite(own, loss=loss, step=step)
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise TrainingError(
                f"Step {step}: the gradient is not finite (norm {norm}). Trained on: {self._described()}. "
                "No step was taken; lower learning_rate, or look at these samples."
            )
        return Measured(
            loss=loss,
            grad_norm=norm,
            active_rank=None if math.isnan(rank) else rank,
            loss_by_band={
                band: total / count if count else None
                for band, total, count in zip(BANDS, bands[: len(BANDS)], bands[len(BANDS) :], strict=True)
            },
            stop=stopping > 0,
        )

    def _by_band(self) -> Tensor:
        """[2 x bands]: the sum of the losses in each band, then the number of samples in each."""
        losses = torch.cat([stats.sample_losses for stats in self.stats])  # [samples]
        bands = [band_of(timestep) for stats in self.stats for timestep in stats.timesteps]
        within = losses.new_tensor([[band == index for band in bands] for index in range(len(BANDS))])
        return torch.cat([(within * losses).sum(dim=1), within.sum(dim=1)])

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


def peak_memory_mib() -> float:
    """The most main memory that this process held so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def peak_device_memory_mib(device: torch.device) -> float | None:
    """The most memory that tensors on a CUDA device held so far, MiB; None for another device."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None

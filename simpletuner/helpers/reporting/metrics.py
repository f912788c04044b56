"""The numbers of an optimiser step: recorded by name, read from the device at once, logged as one row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.reporting.noise_bands import BANDS, band_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from simpletuner.helpers.contracts import Batch, MicroBatchOutput

Reduction = Literal["mean", "last"]
"""mean: over the micro-batches and processes of a step; last: the newest value of this process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One row of the training log.

    To log one more number, add a field here and call `StepAccumulator.record` where it is measured.
    """

    step: int
    epoch: int
    loss: float
    """With the weights of the samples, regularisation among them."""
    prior_loss: float | None = None
    """The part of regularisation samples, with prior_loss_weight; None in a step without any."""
    lr: float
    lr_by_group: Mapping[str, float] | None = None
    """Rates of the groups of parameters with another rate than `lr`, by name; None without such a group."""
    grad_norm: float | None
    """Before clipping; None when it overflowed and the gradient scaler skipped the step."""
    mean_active_rank: float | None = None
    """None without a rank schedule."""
    samples: int
    """Of all processes since step 1."""
    seconds: float
    """Of this optimiser step, without checkpoints and validations."""
    loss_by_band: Mapping[str, float | None]
    """Mean over the samples in each band of timesteps, of all processes; None for a band without samples."""
    memory_mib: float
    """Peak main memory of the main process."""
    device_memory_mib: float | None
    """Peak GPU memory of its tensors; None without a CUDA GPU."""

    @property
    def curves(self) -> dict[str, float]:
        """Every number by name, for trackers that draw curves."""
        values = asdict(self)
        del values["step"]
        bands, rates = values.pop("loss_by_band"), values.pop("lr_by_group") or {}
        values |= {f"loss_{band}": loss for band, loss in bands.items()}
        values |= {f"lr_{group}": rate for group, rate in rates.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True)
class StepAccumulator:
    """Collects the numbers of one optimiser step."""

    _batches: list[Batch] = field(default_factory=list)
    _outputs: list[MicroBatchOutput] = field(default_factory=list)
    _tensors: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _values: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Of this process, in this step."""
        return sum(output.samples for output in self._outputs)

    def add(self, batch: Batch, output: MicroBatchOutput) -> None:
        """Record the loss of a micro-batch; the error for one that is not finite names its samples."""
        self._batches.append(batch)
        self._outputs.append(output)
        self.record("loss", output.loss, reduction="mean")
        if batch.is_regularisation:
            self.record("prior_loss", output.loss, reduction="mean")

    def record(
        self,
        name: str,
        value: float | Tensor | Mapping[str, float] | None,
        *,
        reduction: Reduction = "last",
    ) -> None:
        """Record a field of StepMetrics; `reduce` reads tensors, which are scalars, from the device.

        Every process records the same names.
        """
        if reduction == "last":
            self._values[name] = value
        elif isinstance(value, torch.Tensor):
            self._tensors[name].append(value)
        elif isinstance(value, float | int):
            self._numbers[name].append(value)

    def reduce(self, accelerator: Accelerator, *, step: int, flags: Mapping[str, bool]) -> frozenset[str]:
        """Average over micro-batches and processes, and read the device in a single transfer.

        A result that is not finite becomes None. Every process has the same flags, in one order.

        Returns:
            The names of the flags that are true on any process.

        Raises:
            TrainingError: A loss or the gradient is not finite. With a gradient scaler, which skips steps of
                overflowed gradients, only a loss.
        """
        losses = torch.stack(self._tensors["loss"])  # [micro-batches]
        tensors = torch.stack([torch.stack(values).mean().to(losses) for values in self._tensors.values()])
        numbers = [sum(values) / len(values) for values in self._numbers.values()]
        shared = torch.cat(
            [tensors, losses.new_tensor([*numbers, *map(float, flags.values())]), self._by_band()]
        )
        shared = accelerator.reduce(shared, reduction="mean")
        unread = {name: value for name, value in self._values.items() if isinstance(value, torch.Tensor)}
        own = [value.to(losses)[None] for value in unread.values()]
        read = iter(torch.cat([shared, *own, losses]).tolist())
        means = {name: next(read) for name in (*self._tensors, *self._numbers)}
        raised = frozenset([name for name in flags if next(read) > 0])
        totals, counts = (list(islice(read, len(BANDS))) for _ in range(2))
        last = {name: next(read) for name in unread}
        self._refuse_non_finite(list(read), loss=means["loss"], step=step)
        if not math.isfinite(last["grad_norm"]) and accelerator.scaler is None:
            raise TrainingError(
                f"Step {step}: the gradient is not finite (norm {last['grad_norm']}). Trained on: "
                f"{self._described()}. No step was taken; lower learning_rate, or inspect these samples."
            )
        self._values |= {
            name: value if math.isfinite(value) else None for name, value in (means | last).items()
        }
        self._values["loss_by_band"] = {
            band: total / count if count else None
            for band, total, count in zip(BANDS, totals, counts, strict=True)
        }
        return raised

    def complete(self) -> StepMetrics:
        """The row of this optimiser step; the next one begins."""
        metrics = StepMetrics(**self._values)
        for collected in (self._batches, self._outputs, self._tensors, self._numbers, self._values):
            collected.clear()
        return metrics

    def _by_band(self) -> Tensor:
        """[2 x bands]: the sum of the losses in each band, then the number of samples in each."""
        losses = torch.cat([output.sample_losses for output in self._outputs])  # [samples]
        bands = [band_of(timestep) for output in self._outputs for timestep in output.timesteps]
        within = losses.new_tensor([[band == index for band in bands] for index in range(len(BANDS))])
        return torch.cat([(within * losses).sum(dim=1), within.sum(dim=1)])

    def _refuse_non_finite(self, losses: list[float], *, loss: float, step: int) -> None:
        bad = [index for index, value in enumerate(losses) if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"Step {step}: the loss is {losses[bad[0]]}. Trained on: {self._described(bad)}. "
                "No step was taken; lower learning_rate, or inspect these samples."
            )
        if not math.isfinite(loss):
            raise TrainingError(
                f"Step {step}: the loss of another process is not finite; its own message names the samples."
            )

    def _described(self, indices: list[int] | None = None) -> str:
        chosen = range(len(self._batches)) if indices is None else indices
        return "; ".join(
            f"{sample.dataset_id}/{sample.path} at timestep {timestep}"
            for index in chosen
            for sample, timestep in zip(
                self._batches[index].samples, self._outputs[index].timesteps, strict=True
            )
        )


def peak_device_memory_mib(device: torch.device) -> float | None:
    """Peak memory of tensors on a CUDA device, MiB; None for other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None

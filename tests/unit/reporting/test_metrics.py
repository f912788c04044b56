"""From the micro-batches of a step to its row in the log, and the refusal of values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from simpletuner.helpers.contracts import Batch, MicroBatchOutput, Sample, Size, TextEmbeds
from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.reporting.metrics import (
    StepAccumulator,
    StepMetrics,
    peak_device_memory_mib,
)
from simpletuner.helpers.reporting.smoothing import RunningMean


def batch(name: str) -> Batch:
    """A batch of one sample with this path."""
    size = Size(64, 64)
    sample = Sample("cats", name, "", size, size, (0, 0), size)
    return Batch(torch.zeros(1, 4, 8, 8), TextEmbeds(torch.zeros(1, 2, 4)), (sample,), (0,))


def output(loss: float, *, timestep: int = 500) -> MicroBatchOutput:
    return MicroBatchOutput(torch.tensor(loss), torch.tensor([loss]), 1, (timestep,), None)


def accumulated(*losses: float, rank: float | None = 8.0, grad_norm: float = 0.5) -> StepAccumulator:
    """A step with one micro-batch for each loss, named a.png, b.png, ..."""
    metrics = StepAccumulator()
    for index, loss in enumerate(losses):
        metrics.add(batch(f"{chr(97 + index)}.png"), output(loss, timestep=100 * (index + 1)))
        metrics.record("mean_active_rank", rank, reduction="mean")
    metrics.record("grad_norm", torch.tensor(grad_norm))
    return metrics


def complete(metrics: StepAccumulator) -> StepMetrics:
    """The row, after the values that the device does not hold."""
    own = {"step": 1, "epoch": 0, "lr": 0.1, "samples": 2, "seconds": 1.0, "memory_mib": 10.0}
    for name, value in own.items():
        metrics.record(name, value)
    metrics.record("device_memory_mib", None)
    return metrics.complete()


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_metrics_average_the_micro_batches(accelerator: Accelerator) -> None:
    metrics = accumulated(1.0, 3.0)
    assert not metrics.reduce(accelerator, step=1, flags={"stop": False})
    row = complete(metrics)
    assert (row.loss, row.grad_norm, row.mean_active_rank, row.lr) == (2.0, 0.5, 8.0, 0.1)


def test_metrics_of_the_next_step_begin_anew(accelerator: Accelerator) -> None:
    metrics = accumulated(1.0, 3.0)
    metrics.reduce(accelerator, step=1, flags={})
    complete(metrics)
    assert metrics == StepAccumulator()


@pytest.mark.parametrize("value", [torch.tensor, float])
def test_a_number_recorded_under_the_name_of_a_field_is_averaged_wherever_it_was_measured(
    accelerator: Accelerator, value: Callable[[float], float | torch.Tensor]
) -> None:
    metrics = accumulated(1.0, 3.0, rank=None)
    for rank in (4.0, 5.0):
        metrics.record("mean_active_rank", value(rank), reduction="mean")
    metrics.reduce(accelerator, step=1, flags={})
    assert complete(metrics).mean_active_rank == 4.5


def test_a_number_under_an_unknown_name_is_refused(accelerator: Accelerator) -> None:
    metrics = accumulated(1.0)
    metrics.record("lattent_norm", 1.0)
    metrics.reduce(accelerator, step=1, flags={})
    with pytest.raises(TypeError, match="lattent_norm"):
        complete(metrics)


def test_curves_hold_every_number_that_has_a_value(accelerator: Accelerator) -> None:
    metrics = accumulated(1.0, 3.0, rank=None)
    metrics.reduce(accelerator, step=1, flags={})
    assert complete(metrics).curves == {
        "loss": 2.0,
        "grad_norm": 0.5,
        "epoch": 0,
        "lr": 0.1,
        "samples": 2,
        "seconds": 1.0,
        "memory_mib": 10.0,
        "loss_0-500": 2.0,
    }


def test_metrics_tell_the_losses_of_the_noise_bands_apart(accelerator: Accelerator) -> None:
    metrics = accumulated()
    metrics.add(
        batch("a.png"), MicroBatchOutput(torch.tensor(2.0), torch.tensor([1.0, 3.0]), 2, (0, 500), None)
    )
    metrics.add(
        batch("b.png"), MicroBatchOutput(torch.tensor(6.0), torch.tensor([5.0, 7.0]), 2, (499, 799), None)
    )
    metrics.reduce(accelerator, step=1, flags={})
    row = complete(metrics)
    assert row.loss_by_band == {"0-500": 3.0, "500-800": 5.0, "800-1000": None}
    assert row.loss == 4.0


def test_metrics_read_the_device_once(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__"):
        original = vars(torch._C.TensorBase).get(name) or vars(torch.Tensor)[name]
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *rest, _name=name, _original=original: (reads.append(_name), _original(self, *rest))[
                1
            ],
            raising=False,
        )
    metrics = accumulated(1.0, 3.0)
    metrics.record("mean_active_rank", torch.tensor(5.0), reduction="mean")
    metrics.reduce(accelerator, step=1, flags={})
    assert reads == ["tolist"]


def test_peak_memory_of_a_device_is_that_of_a_gpu() -> None:
    assert peak_device_memory_mib(torch.device("cpu")) is None


def test_metrics_agree_on_a_stop_and_have_no_rank_without_a_schedule(accelerator: Accelerator) -> None:
    metrics = accumulated(1.0, rank=None)
    raised = metrics.reduce(accelerator, step=1, flags={"save": False, "stop": True, "sample": False})
    assert raised == {"stop"}
    assert complete(metrics).mean_active_rank is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.reliability_row(12)
def test_loss_that_is_not_finite_is_refused_naming_step_sample_and_timestep(
    accelerator: Accelerator, value: float
) -> None:
    with pytest.raises(TrainingError, match=r"Step 7: .*(nan|inf).*cats/b\.png at timestep 200") as info:
        accumulated(1.0, value).reduce(accelerator, step=7, flags={})
    assert "a.png" not in str(info.value)


@pytest.mark.reliability_row(12)
def test_gradient_that_is_not_finite_is_refused(accelerator: Accelerator) -> None:
    with pytest.raises(TrainingError, match=r"Step 7: .*nan.*cats/a\.png at timestep 100"):
        accumulated(1.0, grad_norm=math.nan).reduce(accelerator, step=7, flags={})


def test_an_overflowed_gradient_is_left_to_the_scaler_and_has_no_norm(accelerator: Accelerator) -> None:
    accelerator.scaler = torch.amp.GradScaler("cpu")
    metrics = accumulated(1.0, grad_norm=math.inf)
    metrics.reduce(accelerator, step=1, flags={})
    assert complete(metrics).grad_norm is None


def test_smoothed_averages_early_values_evenly_and_follows_later_ones() -> None:
    smoothed = RunningMean(keep=0.5)
    assert smoothed.update(4.0) == 4.0
    assert smoothed.update(1.0) == pytest.approx(2.0)  # (0.5 * 4 + 1 * 1) / 1.5
    for _ in range(50):
        last = smoothed.update(10.0)
    assert last == pytest.approx(10.0)

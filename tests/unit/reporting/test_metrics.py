"""From the micro-batches of a step to its record, and the refusal of what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from simpletuner.helpers.contracts import Batch, MicroBatchOutput, Sample, Size, TextEmbeds
from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.reporting.metrics import StepAccumulator, peak_device_memory_mib, peak_memory_mib
from simpletuner.helpers.reporting.smoothing import Smoothed


def batch(name: str) -> Batch:
    """A batch of one sample with this path."""
    size = Size(64, 64)
    sample = Sample("cats", name, "", size, size, (0, 0), size)
    return Batch(torch.zeros(1, 4, 8, 8), TextEmbeds(torch.zeros(1, 2, 4)), (sample,), (0,))


def stats(loss: float, *, timestep: int = 500, rank: float | None = 8.0) -> MicroBatchOutput:
    """What a micro-batch of one sample measured."""
    return MicroBatchOutput(torch.tensor(loss), torch.tensor([loss]), 1, (timestep,), rank)


def window_of(*losses: float, rank: float | None = 8.0) -> StepAccumulator:
    """A window with one micro-batch for each loss, named a.png, b.png, ..."""
    window = StepAccumulator()
    for index, loss in enumerate(losses):
        window.add(batch(f"{chr(97 + index)}.png"), stats(loss, timestep=100 * (index + 1), rank=rank))
    return window


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_window_averages_its_micro_batches(accelerator: Accelerator) -> None:
    measured = window_of(1.0, 3.0).measure(accelerator, grad_norm=torch.tensor(0.5), stop=False, step=1)
    assert (measured.loss, measured.grad_norm, measured.active_rank, measured.stop) == (2.0, 0.5, 8.0, False)


def test_window_tells_the_losses_of_the_noise_bands_apart(accelerator: Accelerator) -> None:
    window = StepAccumulator()
    window.add(
        batch("a.png"), MicroBatchOutput(torch.tensor(2.0), torch.tensor([1.0, 3.0]), 2, (0, 500), None)
    )
    window.add(
        batch("b.png"), MicroBatchOutput(torch.tensor(6.0), torch.tensor([5.0, 7.0]), 2, (499, 799), None)
    )
    measured = window.measure(accelerator, grad_norm=torch.tensor(0.5), stop=False, step=1)
    assert measured.loss_by_band == {"0-500": 3.0, "500-800": 5.0, "800-1000": None}
    assert measured.loss == 4.0


def test_window_reads_the_device_once(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
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
    window_of(1.0, 3.0).measure(accelerator, grad_norm=torch.tensor(0.5), stop=False, step=1)
    assert reads == ["tolist"]


def test_peak_memory_holds_what_was_allocated() -> None:
    before = peak_memory_mib()
    assert 10 < before < 1 << 20
    block = torch.ones(64 << 20)  # 256 MiB
    assert peak_memory_mib() >= min(before + 1, block.nbytes / 2**20)
    assert peak_device_memory_mib(torch.device("cpu")) is None


def test_window_passes_on_the_wish_to_stop_and_knows_no_rank_without_a_schedule(
    accelerator: Accelerator,
) -> None:
    window = window_of(1.0, rank=None)
    measured = window.measure(accelerator, grad_norm=torch.tensor(0.5), stop=True, step=1)
    assert measured.stop
    assert measured.active_rank is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.reliability_row(12)
def test_window_refuses_a_loss_that_is_not_finite_naming_step_sample_and_timestep(
    accelerator: Accelerator, value: float
) -> None:
    window = window_of(1.0, value)
    with pytest.raises(
        TrainingError, match=r"Step 7: the loss is (nan|inf).*cats/b\.png at timestep 200"
    ) as info:
        window.measure(accelerator, grad_norm=torch.tensor(1.0), stop=False, step=7)
    assert "a.png" not in str(info.value)


@pytest.mark.reliability_row(12)
def test_window_refuses_a_gradient_that_is_not_finite(accelerator: Accelerator) -> None:
    with pytest.raises(TrainingError, match=r"Step 7: the gradient.*cats/a\.png at timestep 100"):
        window_of(1.0).measure(accelerator, grad_norm=torch.tensor(math.nan), stop=False, step=7)


def test_window_leaves_an_overflowed_gradient_to_the_scaler(accelerator: Accelerator) -> None:
    accelerator.scaler = torch.amp.GradScaler("cpu")
    measured = window_of(1.0).measure(accelerator, grad_norm=torch.tensor(math.inf), stop=False, step=1)
    assert measured.grad_norm == math.inf


def test_smoothed_averages_early_values_evenly_and_follows_later_ones() -> None:
    smoothed = Smoothed(keep=0.5)
    assert smoothed.update(4.0) == 4.0
    assert smoothed.update(1.0) == pytest.approx(2.0)  # (0.5 * 4 + 1 * 1) / 1.5
    for _ in range(50):
        last = smoothed.update(10.0)
    assert last == pytest.approx(10.0)

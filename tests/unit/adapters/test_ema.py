"""The moving average: hand-computed values, float32 whatever the weights, and weights that come back."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from torch import Tensor

from simpletuner.helpers.adapters.ema import Ema, decay_after
from simpletuner.helpers.configuration.schema.ema import EmaConfig
from simpletuner.helpers.errors import AdapterError
from tests.unit.checkpointing.test_state import TwoLinears

CPU = torch.device("cpu")


def new_ema(adapter: TwoLinears, **keys: object) -> Ema:
    return Ema(adapter, EmaConfig(use_ema=True, **keys), device=CPU)


def fill(adapter: TwoLinears, value: float) -> None:
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.fill_(value)


def averages(ema: Ema) -> set[float]:
    return {round(value, 6) for tensor in ema.tensors().values() for value in tensor.flatten().tolist()}


@pytest.mark.parametrize(
    ("num_updates", "decay", "expected"),
    [(0, 0.995, 0.1), (1, 0.995, 2 / 11), (10, 0.995, 11 / 20), (1799, 0.995, 0.995), (0, 0.0, 0.0)],
)
def test_decay_warms_up_to_the_configured_one(num_updates: int, decay: float, expected: float) -> None:
    assert decay_after(num_updates, decay=decay) == pytest.approx(expected, abs=3e-4)
    assert decay_after(num_updates, decay=decay) <= decay


@pytest.mark.parametrize(("decay", "expected"), [(0.995, [0.9, 1.8, 0.45]), (0.15, [0.9, 1.835, 0.27525])])
def test_average_of_hand_computed_steps(decay: float, expected: list[float]) -> None:
    adapter = TwoLinears()
    fill(adapter, 0.0)
    ema = new_ema(adapter, ema_decay=decay)
    for step, (weight, average) in enumerate(zip([1.0, 2.0, 0.0], expected, strict=True), start=1):
        fill(adapter, weight)
        ema.update(step)
        assert averages(ema) == {average}


def test_only_steps_at_the_interval_are_averaged_and_counted() -> None:
    adapter = TwoLinears()
    fill(adapter, 0.0)
    ema = new_ema(adapter, ema_update_interval=3)
    seen = []
    for step in range(1, 8):
        fill(adapter, float(step))
        ema.update(step)
        seen.append((ema.num_updates, *averages(ema)))
    second = round(2.7 * 2 / 11 + 6 * 9 / 11, 6)
    assert seen == [(0, 0.0), (0, 0.0), (1, 2.7), (1, 2.7), (1, 2.7), (2, second), (2, second)]


def test_average_of_bf16_weights_moves_where_a_bf16_average_would_not() -> None:
    adapter = TwoLinears()
    adapter.layers.to(torch.bfloat16)
    fill(adapter, 1.0)
    ema = new_ema(adapter, ema_decay=0.9999)
    ema.load(ema.tensors(), num_updates=10**6)  # past the warm-up
    fill(adapter, 1.5)
    for step in range(1, 101):
        ema.update(step)
    (average,) = averages(ema)
    assert average == pytest.approx(1.5 - 0.5 * 0.9999**100, abs=1e-4)
    assert {tensor.dtype for tensor in ema.tensors().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_trained_weights_come_back_bit_for_bit(dtype: torch.dtype, fails: bool) -> None:
    adapter = TwoLinears()
    adapter.layers.to(dtype)
    ema = new_ema(adapter)
    fill(adapter, 1 / 3)
    ema.update(1)
    kept = ema.tensors()
    trained = [weight.detach().clone() for weight in adapter.parameters()]
    try:
        with ema.weights():
            for weight, average in zip(adapter.parameters(), kept.values(), strict=True):
                assert torch.equal(weight, average.to(dtype))
            fill(adapter, 7.0)  # whatever happens to the weights inside is no part of the run
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(map(torch.equal, adapter.parameters(), trained))
    assert all(map(torch.equal, ema.tensors().values(), kept.values()))
    assert all(weight.requires_grad for weight in adapter.parameters())


def test_average_is_no_view_of_the_weights() -> None:
    adapter = TwoLinears()
    fill(adapter, 1.0)
    ema = new_ema(adapter)
    fill(adapter, 2.0)
    assert averages(ema) == {1.0}
    ema.restart()
    assert averages(ema) == {2.0}


def test_average_of_another_adapter_is_refused() -> None:
    ema, wider = new_ema(TwoLinears()), new_ema(TwoLinears(width=5))
    for tensors in (wider.tensors(), {}, ema.tensors() | {"9": torch.zeros(1)}):
        with pytest.raises(AdapterError, match="shapes"):
            ema.load(tensors, num_updates=1)
    with pytest.raises(AdapterError, match="finite"):
        ema.load(ema.tensors() | {"1": torch.full((4,), float("nan"))}, num_updates=1)


def test_an_update_holds_a_float32_copy_of_one_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = TwoLinears()
    for weight in adapter.parameters():
        weight.data = weight.data.bfloat16()
    ema, copies, alive = new_ema(adapter), [], []
    make_copy = Tensor.to

    def noted(tensor: Tensor, *args: object, **options: object) -> Tensor:
        copy: Tensor = make_copy(tensor, *args, **options)  # type: ignore[call-overload]  # passed on
        copies.append(ref(copy))
        alive.append(sum(each() is not None for each in copies))
        return copy

    monkeypatch.setattr(Tensor, "to", noted)
    ema.update(ema.config.ema_update_interval)
    assert len(copies) == len(adapter.parameters()) > 2
    assert max(alive) <= 2  # the one before may live until it is replaced

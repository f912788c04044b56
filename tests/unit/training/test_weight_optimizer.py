"""Steps of whole models: stochastic rounding, and steps in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.training.weight_optimizer import WeightOptimizer, rounded_stochastically

SINGLY = [
    name
    for name, record in OPTIMIZERS.items()
    if not record.needs_all_gradients and name not in ("ao-adamw8bit", "ao-adamw4bit")  # which compile
]


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)


def optimizer_of(
    model: nn.Module, name: str = "adamw", *, rate: float = 1e-3, **options: Any
) -> WeightOptimizer:
    record, steps = OPTIMIZERS[name], [0]
    weights = list(model.parameters())
    groups: Sequence[Any] = [{"params": [weight]} for weight in weights]
    if options.get("at_once"):
        groups = [{"params": weights}]
    inner = record.load()(groups, lr=rate, **record.defaults)
    return WeightOptimizer(inner, seed=5, step=lambda: steps[0], **options)


def train(model: nn.Module, optimizer: WeightOptimizer, *, steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        optimizer.num_steps = lambda step=step: step
        torch.manual_seed(step)
        inputs = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
        model(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight in model.parameters()]


def test_rounding_has_the_right_mean_where_rounding_to_the_nearest_never_moves() -> None:
    value, spacing = torch.tensor(1.0), 2.0**-7  # of bf16 numbers above 1
    update = 0.3 * spacing
    assert (value + update).bfloat16() == 1.0
    generator = torch.Generator().manual_seed(0)
    rounded = rounded_stochastically(torch.full((40_000,), 1.0 + update), generator=generator).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + spacing}
    # Six standard errors of a share of 0.3.
    assert (rounded.mean() - 1.0) / spacing == pytest.approx(0.3, abs=6 * (0.21 / 40_000) ** 0.5)


def test_rounding_keeps_bf16_numbers_and_signs() -> None:
    exact = torch.tensor([1.0, -2.5, 0.0, 3e-39, -65280.0]).bfloat16()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(rounded_stochastically(exact.float(), generator=generator), exact)
    below = rounded_stochastically(torch.full((1000,), -1.001), generator=generator).float()
    assert set(below.tolist()) == {-1.0, -1.0078125}


def test_small_updates_are_kept_on_average_and_lost_by_bf16_alone() -> None:
    rate, steps, size = 1e-4, 100, 4096

    def moved(*, rounds: bool) -> Tensor:
        weight = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        inner = torch.optim.SGD([{"params": [weight]}], lr=rate)
        numbers = iter(range(steps))
        optimizer = WeightOptimizer(inner, seed=1, step=lambda: next(numbers)) if rounds else inner
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return 1.0 - weight.detach().float()

    assert not moved(rounds=False).any()
    # The rounding of one step has a variance below (spacing / 2) ** 2, with a spacing of 1/256 below 1.
    error = (steps**0.5) / 512 / size**0.5
    assert moved(rounds=True).mean() == pytest.approx(rate * steps, abs=5 * error)


@pytest.mark.parametrize("name", SINGLY)
def test_steps_in_the_backward_pass_give_the_same_weights_bit_for_bit(name: str) -> None:
    if package := OPTIMIZERS[name].package:
        pytest.importorskip(package)
    start, apart, fused = network(), network(), network()
    after = train(apart, optimizer_of(apart, name))
    in_backward = optimizer_of(fused, name, in_backward=True)
    assert all(map(torch.equal, after, train(fused, in_backward)))
    assert not any(map(torch.equal, after, start.parameters()))
    state = [each for values in in_backward.state.values() for each in values.values()]
    assert not any(isinstance(each, Tensor) and each.dtype == torch.bfloat16 for each in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_are_freed_and_their_norm_is_kept(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = optimizer_of(model, in_backward=True)
    plain = network(dtype)
    for each in (plain, model):
        each(torch.ones(2, 8, dtype=dtype)).float().sum().backward()
    assert len(optimizer.inner.param_groups) == len(list(model.parameters()))
    assert all(weight.grad is None for weight in model.parameters())
    norms = [weight.grad.float().norm() for weight in plain.parameters() if weight.grad is not None]
    torch.testing.assert_close(optimizer.gradient_norm(), torch.stack(norms).norm())
    assert optimizer.gradient_norm() == 0


def test_bound_clips_each_element_before_its_step() -> None:
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([{"params": [weight]}], lr=1.0)
    WeightOptimizer(inner, seed=0, step=lambda: 0, in_backward=True, bound=0.5)
    (weight * torch.tensor([0.25, -3.0])).sum().backward()
    assert weight.tolist() == [-0.25, 0.5]


@pytest.mark.parametrize("name", [name for name, each in OPTIMIZERS.items() if each.needs_all_gradients])
def test_optimisers_that_need_all_gradients_step_once_for_all_weights(name: str) -> None:
    if package := OPTIMIZERS[name].package:
        pytest.importorskip(package)
    rounded, whole = network(), network(torch.float32)
    whole.load_state_dict(rounded.state_dict())
    rate = OPTIMIZERS[name].default_learning_rate
    after = train(rounded, optimizer_of(rounded, name, rate=rate, at_once=True), steps=1)
    expected = train(whole, optimizer_of(whole, name, rate=rate, at_once=True), steps=1)
    for ours, theirs in zip(after, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-6, atol=2e-3)
    assert all(weight.dtype == torch.bfloat16 for weight in after)


def test_learning_rate_of_a_schedule_reaches_the_inner_optimiser() -> None:
    model = network()
    optimizer = optimizer_of(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = [weight.clone() for weight in model.parameters()]
    assert all(map(torch.equal, train(model, optimizer, steps=1), before))


def test_rounding_depends_on_the_seed_the_step_and_the_weight_alone() -> None:
    def after_a_step_numbered(number: int, *, weights: int) -> list[Tensor]:
        ones = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(weights)]
        inner = torch.optim.SGD([{"params": [each]} for each in ones], lr=2e-3)
        for weight in ones:
            weight.grad = torch.ones_like(weight)
        WeightOptimizer(inner, seed=5, step=lambda: number).step()
        return [weight.detach() for weight in ones]

    first, second = after_a_step_numbered(3, weights=2)
    assert torch.equal(after_a_step_numbered(3, weights=1)[0], first)
    assert not torch.equal(after_a_step_numbered(4, weights=1)[0], first)
    assert not torch.equal(first, second)

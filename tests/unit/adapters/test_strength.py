"""The strength of an adapter in training: of a slider's datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.choices.algorithms import ALGORITHMS, ARGUMENTS, DISPROPORTIONATE
from tests.unit.adapters.attaching import attach
from tests.unit.adapters.test_every_option import IMAGE, INPUT, attached, configured, toy

LAYERS = {"linear": INPUT, "conv": IMAGE}
SCALE = 2.0 / 4
LORA = {
    "multiplier": 1.0,
    "linear_dim": 4,
    "linear_alpha": 2.0,
    "apply_preset": {"target_module": ["Attention"]},
}


class Attention(nn.Module, PeftAdapterMixin):
    """A denoiser of one layer, which may run again in backward."""

    def __init__(self, *, recomputes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.recomputes = nn.Linear(6, 5, bias=False).requires_grad_(False), recomputes

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.to_q, x, use_reentrant=False) if self.recomputes else self.to_q(x)


def _plain(model: Any) -> Adapter:
    return attach(model, lora_rank=4, lora_alpha=2.0, peft_lora_target_modules=("to_q",))


def _lycoris(model: Any) -> Adapter:
    return attach(model, LORA | {"algo": "lora"})


def _tlora(model: Any) -> Adapter:
    return attach(model, LORA | {"algo": "tlora", "tlora_min_rank": 1, "tlora_init": "vanilla"})


def _factors(adapter: Adapter) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, I] and B [O, R]."""
    first, second = adapter.parameters()
    return (first, second) if first.shape[0] == 4 else (second, first)


def _hand(
    model: Attention, a: Tensor, b: Tensor, opened: Tensor, *, x: Tensor, target: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """The gradients of 0.5 |y - target|^2 with y = W x + strength * scale * B diag(m) A x, written out."""
    hidden = (x @ a.T) * opened
    error = x @ model.to_q.weight.T + strength * SCALE * hidden @ b.T - target
    return (
        strength * SCALE * ((error @ b) * opened).T @ x,
        strength * SCALE * error.T @ hidden,
    )


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [_plain, _lycoris, _tlora], ids=["peft", "lora", "tlora"])
def test_images_of_both_directions_give_the_gradient_that_is_worked_out_by_hand(
    make: Callable[[Any], Adapter], recomputes: bool
) -> None:
    model = Attention(recomputes=recomputes)
    adapter = make(model)
    a, b = _factors(adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(torch.randn(b.shape, generator=generator))
    model.train()
    expected = [torch.zeros_like(a), torch.zeros_like(b)]
    for strength, timestep in ((0.5, 300), (-0.5, 700), (1.0, 300)):
        x, target = torch.randn(3, 6, generator=generator), torch.randn(3, 5, generator=generator)
        opened = torch.ones(4)
        with adapter.rank_mask_for([timestep]):
            if adapter.tlora_config is not None:
                current = mask.current_mask(adapter.group, 4)  # type: ignore[attr-defined]
                assert current is not None
                opened = current[0].clone()
                assert opened.sum() < 4
            with adapter.at_strength(strength):
                (0.5 * (model(x.requires_grad_()) - target).square().sum()).backward()
        with torch.no_grad():
            found = _hand(model, a, b, opened, x=x, target=target, strength=strength)
        expected = [before + each for before, each in zip(expected, found, strict=True)]
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.grad, expected[1], rtol=1e-4, atol=1e-5)


@contextmanager
def _fails() -> Iterator[None]:
    with pytest.raises(ZeroDivisionError):
        yield


def test_the_strength_is_full_again_after_a_step_that_failed() -> None:
    model = Attention(recomputes=False)
    adapter = _lycoris(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(1.0)
    x = torch.ones(1, 6)
    full = model(x)
    with _fails(), adapter.at_strength(-1.0):
        assert not torch.equal(model(x), full)
        raise ZeroDivisionError
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("option", [None, *DISPROPORTIONATE])
def test_which_effects_are_proportional_to_the_strength(algo: str, option: str | None) -> None:
    record = ALGORITHMS[algo]
    if option is not None and option not in record.arguments:
        assert option in ARGUMENTS
        return
    model, base = toy(), toy()
    adapter = attached(model, configured(algo, {} if option is None else {option: True}))
    generator = torch.Generator().manual_seed(2)
    is_proportional = True
    with torch.no_grad(), adapter.rank_mask_for([400]):
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, x in LAYERS.items():
            plain, found = getattr(base, name)(x), {}
            for strength in (1.0, -0.5):
                adapter.set_strength(strength)
                found[strength] = getattr(model, name)(x) - plain
            assert found[1.0].norm() > 1e-3
            error = (found[-0.5] + 0.5 * found[1.0]).norm() / found[1.0].norm()
            is_proportional = is_proportional and float(error) < 1e-4
    assert is_proportional is (record.is_proportional and option is None)

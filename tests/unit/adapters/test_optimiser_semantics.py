"""A thousand steps without a gradient: weight decay pulls to the start, whatever the optimiser."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import prodigyopt
import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.configuration.schema.lycoris import TLoraInit

DECAY = 0.1
STEPS = 1000
Parameters = list[nn.Parameter]


def adamw(parameters: Parameters) -> Optimizer:
    return AdamW(parameters, lr=1e-2, weight_decay=DECAY)


def fused_adamw(parameters: Parameters) -> Optimizer:
    return AdamW(parameters, lr=1e-2, weight_decay=DECAY, fused=True)


def prodigy(parameters: Parameters) -> Optimizer:
    optimizer: Optimizer = prodigyopt.Prodigy(
        parameters, weight_decay=DECAY, use_bias_correction=True, safeguard_warmup=True
    )
    return optimizer


def adamw_8bit(parameters: Parameters) -> Optimizer:
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, lr=1e-2, weight_decay=DECAY, min_8bit_size=256
    )
    return optimizer


OPTIMISERS = [adamw, fused_adamw, prodigy, adamw_8bit]


def make_layer(init: TLoraInit) -> TLoraLayer:
    torch.manual_seed(0)
    return TLoraLayer("x", nn.Linear(64, 48), 1.0, 16, 16.0, tlora_init=init)


def step_without_gradients(layer: TLoraLayer, optimizer: Optimizer) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(STEPS):
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMISERS)
@pytest.mark.parametrize("init", ["random", "weight", "vanilla"])
def test_thousand_steps_without_a_gradient_leave_the_delta_at_zero(
    init: TLoraInit, make: Callable[[Parameters], Optimizer]
) -> None:
    layer = make_layer(init)
    step_without_gradients(layer, make(list(layer.parameters())))
    assert not layer.get_diff_weight()[0].any()


def test_weight_decay_brings_a_trained_delta_back_to_zero() -> None:
    layer = make_layer("random")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    before = float(layer.delta_norm())
    step_without_gradients(layer, adamw(list(layer.parameters())))
    # Each difference shrinks by (1 - lr * decay) a step, so the delta by at least that.
    assert 0 < float(layer.delta_norm()) < before * (1 - 1e-2 * DECAY) ** STEPS * 1.01


def test_eight_bit_state_is_really_eight_bit() -> None:
    layer = make_layer("random")
    optimizer = adamw_8bit(list(layer.parameters()))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.numel() > 256}
    assert torch.uint8 in dtypes
    assert layer.get_diff_weight()[0].any()

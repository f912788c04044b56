"""Flops of the blocks of each family at real width, against torch's counter on blocks without memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import simpletuner
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.estimating.step_flops import (
    ATTENTION_BACKWARD,
    block_flops,
    forward_flops,
    step_flops,
)
from simpletuner.helpers.models.memory_model import Arithmetic, Layout, LowRank, Step
from simpletuner.helpers.models.registry import memory_of
from tests.benchmarks.blocks import KINDS, Shape

# Kind -> shape at the width of its model, on images of 512 px.
REAL = {
    "SDXL residual": Shape(batch=1, edge=64, text=77, width=320),
    "SDXL transformer": Shape(batch=1, edge=32, text=77, width=640),
    "Flux.1 double": Shape(batch=1, edge=32, text=512, width=3072, head=128),
    "Flux.1 single": Shape(batch=1, edge=32, text=512, width=3072, head=128),
    "Flux.2 double": Shape(batch=1, edge=32, text=512, width=6144, head=128),
    "Flux.2 single": Shape(batch=1, edge=32, text=512, width=6144, head=128),
}
DEMO = Path(simpletuner.__file__).parent / "demo"
FORMATS = Arithmetic(is_mixed=False, is_gpu=True)
NOTHING = LowRank(rank=1, is_tlora=False, adapts=lambda _: False)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_block_are_those_that_torch_counts(kind: str, is_whole: bool) -> None:
    shape = REAL[kind]
    with torch.device("meta"):
        module = KINDS[kind].module(shape).requires_grad_(is_whole)
        inputs = KINDS[kind].inputs(shape)
    streams = [inputs[name].requires_grad_() for name in KINDS[kind].streams if inputs.get(name) is not None]
    assert streams
    forward, backward = counted(module, inputs)
    block = KINDS[kind].block(shape)
    step = Step(arithmetic=FORMATS, batch_size=1, adapter=None if is_whole else NOTHING)
    assert block.linear_flops + block.attention_flops == pytest.approx(forward, rel=0.01)
    # The counter's backward pass of attention keeps the scores, which is twice the forward pass.
    expected = block_flops(block, step, num_forwards=1) - (ATTENTION_BACKWARD - 2) * block.attention_flops
    assert expected == pytest.approx(forward + backward, rel=0.02)  # text needs no gradients


def test_flops_of_a_whole_unet_are_those_that_torch_counts() -> None:
    config = json.loads((DEMO / "sdxl" / "unet" / "config.json").read_bytes())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        inputs = {
            "sample": torch.zeros(1, 4, 64, 96),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.zeros(1, 77, config["cross_attention_dim"]),
            "added_cond_kwargs": {"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)},
        }
    with FlopCounterMode(display=False) as measured, torch.no_grad():
        unet(**inputs)
    memory = memory_of("sdxl")
    assert memory is not None
    layout = memory.layout(config, size=Size(512, 768), text_tokens=77)
    assert forward_flops(layout) == pytest.approx(measured.get_total_flops(), rel=0.02)


def test_a_step_has_the_flops_of_its_batch_and_of_what_runs_again() -> None:
    layout = Layout((KINDS["Flux.1 single"].block(REAL["Flux.1 single"]),) * 2, ())
    adapter = replace(NOTHING, rank=16, adapts=lambda layer: layer.name == "proj_mlp")
    linear, attention = layout.blocks[0].linear_flops, layout.blocks[0].attention_flops
    factors = 2 * (32 * 32 + 512) * 16 * (3072 + 4 * 3072)

    def flops(interval: int, batch_size: int, *, is_tlora: bool = False) -> float:
        own = replace(adapter, is_tlora=is_tlora)
        step = Step(arithmetic=FORMATS, batch_size=batch_size, adapter=own, checkpointing_interval=interval)
        return step_flops(layout, step)

    assert flops(0, 1) == 2 * (2 * linear + 3.5 * attention + 3 * factors)
    assert flops(1, 1) == 2 * (3 * linear + 4.5 * attention + 4 * factors)
    assert flops(2, 3) == 3 / 2 * (flops(0, 1) + flops(1, 1))
    assert flops(0, 1, is_tlora=True) - flops(0, 1) == 2 * 3 * factors
    whole = step_flops(layout, Step(arithmetic=FORMATS, batch_size=1, adapter=None))
    assert whole == 2 * (3 * linear + 3.5 * attention)


def counted(module: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """Flops of a forward and of a backward pass."""
    with FlopCounterMode(display=False) as forward:
        outputs = module(**inputs)
    outputs = [
        each for each in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(each, Tensor)
    ]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
    return forward.get_total_flops(), backward.get_total_flops()

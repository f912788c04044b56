"""Memory of a run by part: the trained parameters, the optimiser's state, and their sum."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from simpletuner.helpers.adapters.trainable import one_group
from simpletuner.helpers.checkpointing.optimizer_state import num_state_bytes
from simpletuner.helpers.choices.optimizer_states import state_bytes
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.estimating.step_memory import TrainingSetup, run_memory, states_bytes
from simpletuner.helpers.models.memory_model import (
    Arithmetic,
    Block,
    Kept,
    Layer,
    Layout,
    LowRank,
    Shape,
    Step,
)
from simpletuner.helpers.training.optimizers import build_optimizer

BLOCK = Block(
    kind="block",
    layers=(Layer("a", 64, 128, 10, "norm"), Layer("b", 128, 64, 10, "gelu", has_bias=False)),
    kept=(Kept("norm input", 640, "norm"),),
    input_numbers=640,
    norm_weights=(64,),
)
NUM_WEIGHTS = 64 * 128 + 128 + 128 * 64 + 64
LAYOUT = Layout((BLOCK, BLOCK), (Layer("", 64, 32, 1, has_bias=False),))
WHOLE = TrainingSetup(
    layout=LAYOUT,
    step=Step(arithmetic=Arithmetic(is_mixed=True, is_gpu=True), batch_size=2, adapter=None),
    optimizer=OptimizerConfig(),
    has_ema=True,
)


@pytest.mark.parametrize(
    "shape", [(300,), (98304,), (70, 67), (64, 3072), (1536, 768), (64, 32, 3, 3)], ids=str
)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_has_the_bytes_of_the_real_optimiser(name: str, shape: Shape) -> None:
    config = OptimizerConfig(optimizer=name)
    assert states_bytes(Counter([shape, shape]), config) == 2 * measured(config, shape)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adafactor", "beta1=0.9"),
        ("bnb-adamw8bit", "min_8bit_size=1000000"),
        ("ao-adamw4bit", "block_size=64"),
        ("prodigyplus", "factored=false"),
    ],
)
def test_state_follows_the_arguments_that_change_it(name: str, arguments: str) -> None:
    config = OptimizerConfig(optimizer=name, optimizer_config=arguments)
    shape = (128, 256)
    assert states_bytes(Counter([shape]), config) == measured(config, shape)
    assert states_bytes(Counter([shape]), OptimizerConfig(optimizer=name)) != measured(config, shape)


def measured(config: OptimizerConfig, shape: Shape) -> int:
    """Bytes of the state that the real optimiser makes in a step."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = build_optimizer(one_group("weight", [weight]), config)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return num_state_bytes(optimizer)


def test_optimiser_of_another_package_counts_as_adamw() -> None:
    assert state_bytes("outside", (3, 4), {}) == state_bytes("adamw", (3, 4), {})


def test_parts_of_a_whole_model_in_16_bits() -> None:
    memory = run_memory(WHOLE)
    trained = 2 * NUM_WEIGHTS + 64 * 32
    assert (memory.weights, memory.adapter, memory.gradients) == (2 * trained, 0, 2 * trained)
    assert memory.states == 8 * trained + 4 * (2 * 4 + 1)  # two moments, and a counter for each tensor
    assert memory.ema == 4 * trained
    assert memory.activations == 2 * 2 * (640 * 4 + 640 * 2 + 1280 * 2)
    assert memory.recomputed == 0
    assert memory.working == 2 * 4 * (3 * 10 * 128 + 2 * 640)
    assert memory.total == sum(
        (memory.weights, memory.gradients, memory.states, memory.ema, memory.activations, memory.working)
    )


def test_a_step_in_the_backward_pass_keeps_one_gradient() -> None:
    assert run_memory(replace(WHOLE, steps_in_backward=True)).gradients == 2 * 64 * 128


def test_a_layer_filter_trains_its_layers_alone() -> None:
    memory = run_memory(replace(WHOLE, layer_filter=("^a$",)))
    assert memory.gradients == 2 * 2 * (64 * 128 + 128)
    assert run_memory(replace(WHOLE, layer_filter=("blocks.0",))) == run_memory(WHOLE)


def test_float32_weights_have_float32_gradients() -> None:
    setup = replace(WHOLE, has_float32_weights=True)
    memory, mixed = run_memory(setup), run_memory(WHOLE)
    assert (memory.weights, memory.gradients) == (2 * mixed.weights, 2 * mixed.gradients)
    assert memory.activations == mixed.activations


def test_parts_of_a_tlora_on_a_quantised_model() -> None:
    adapter = LowRank(rank=4, is_tlora=True, adapts=lambda layer: layer.name == "a")
    step = replace(WHOLE.step, adapter=adapter)
    memory = run_memory(replace(WHOLE, step=step, precision="fp8-torchao"))
    trained = 2 * (4 * 64 + 128 * 4 + 4)
    assert memory.weights == 2 * (2 * NUM_WEIGHTS + 64 * 32) - 2 * (2 * 64 * 128 - 4 * (128 + 64))
    assert (memory.adapter, memory.gradients, memory.ema) == (8 * trained, 4 * trained, 4 * trained)
    assert memory.states == 8 * trained + 4 * 2 * 3

"""The memory model against blocks and transformers of diffusers: what they keep, and their weights."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.models.flux.memory import layout as flux_layout
from simpletuner.helpers.models.memory_model import (
    MIXED,
    Arithmetic,
    Layer,
    Layout,
    LowRank,
    Step,
    block_bytes,
    kept_bytes,
    recomputed_bytes,
)
from simpletuner.helpers.models.recomputing import recompute_blocks
from simpletuner.helpers.models.registry import memory_of
from tests.benchmarks.blocks import KINDS, TRAININGS, Case, KeptTensors, Shape, measure
from tests.integration.layer_table import MODELS, Model

BOUND = 0.01
"""Largest error of the kept bytes of a block."""
FORMATS = {
    "float32": Arithmetic(is_mixed=False, is_gpu=False),
    "bf16": Arithmetic(is_mixed=True, is_gpu=False),
    "bf16 with the norms of a GPU": Arithmetic(is_mixed=True, is_gpu=True),
}
SHAPES = (
    Shape(batch=2, edge=6, text=16, width=128, context=512),
    Shape(batch=1, edge=10, text=24, width=128, context=512),
)
CASES = [
    ("SDXL residual", "whole"),
    *((kind, training) for kind in KINDS if "residual" not in kind for training in TRAININGS[:3]),
    # The modulation is adapted too.
    *((kind, "tlora on all") for kind in ("Flux.1 double", "Flux.1 single")),
    *((kind, "merged lora") for kind in KINDS if "residual" not in kind),
]


@pytest.mark.parametrize("arithmetic", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("kind", "training"), CASES)
def test_a_block_keeps_and_trains_what_the_model_says(
    kind: str, training: str, arithmetic: Arithmetic
) -> None:
    for shape in SHAPES:
        case = Case(kind, shape, training, arithmetic, rank=8)
        block, measured = KINDS[kind].block(shape), measure(case)
        assert block_bytes(block, case.step) == pytest.approx(measured.kept, rel=BOUND)
        assert shape.batch * block.input_numbers * arithmetic.compute_bytes == measured.entering
        assert block.num_weights * arithmetic.compute_bytes == measured.weights
        adapter = case.step.adapter
        trained = block.shapes
        if adapter is not None:
            trained = tuple(
                s for layer in block.layers if adapter.adapts(layer) for s in adapter.shapes_on(layer)
            )
            assert measured.adapter == 4 * sum(map(prod, trained))
        assert Counter(trained) == Counter(measured.trained)
        assert measured.gradients == (measured.adapter or measured.weights)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.title)
def test_layout_of_a_published_model_has_its_weights(model: Model) -> None:
    memory = memory_of(model.spec.name)
    assert memory is not None
    for flavour in model.flavours:
        config = memory.PUBLISHED[flavour]
        own = {"guidance_embeds": bool(config["guidance_embeds"])} if "guidance_embeds" in config else {}
        found = Counter(tuple(weight.shape) for weight in model.make(**own).parameters())
        assert memory.layout(config, size=Size(1024, 1024), text_tokens=77).shapes == found


TINY = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
}
EDGE, TEXT = 8, 12


def test_recomputing_frees_in_a_transformer_what_the_blocks_keep() -> None:
    layout = flux_layout(TINY, size=Size(16 * EDGE, 16 * EDGE), text_tokens=TEXT)
    measured, counted = [], []
    for interval in (0, 1, 2):
        measured.append(_kept_by_transformer(interval))
        step = Step(
            arithmetic=FORMATS["float32"], batch_size=1, adapter=None, checkpointing_interval=interval
        )
        counted.append(kept_bytes(layout, step))
    assert measured[0] - measured[1] == pytest.approx(counted[0] - counted[1], rel=BOUND)
    assert measured[0] - measured[2] == pytest.approx(counted[0] - counted[2], rel=BOUND)
    assert measured[0] > counted[0]  # what lies outside the blocks


def _kept_by_transformer(interval: int) -> int:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**TINY, axes_dims_rope=(16, 24, 24)).train()
    if interval:
        recompute_blocks(model, interval=interval)
    inputs = {
        "hidden_states": torch.randn(1, EDGE**2, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.zeros(EDGE**2, 3),
    }
    kept = KeptTensors([*model.parameters(), *inputs.values()])
    with saved_tensors_hooks(kept.note, lambda tensor: tensor):
        model(**inputs, return_dict=False)
    return kept.num_bytes


def test_recomputing_needs_the_largest_block_beside_the_inputs_of_all() -> None:
    layout = flux_layout(TINY, size=Size(16 * EDGE, 16 * EDGE), text_tokens=TEXT)
    adapter = LowRank(rank=4, is_tlora=True, adapts=lambda layer: layer.is_target)

    def step(interval: int) -> Step:
        return Step(
            arithmetic=FORMATS["bf16"], batch_size=3, adapter=adapter, checkpointing_interval=interval
        )

    entering = 3 * (EDGE**2 + TEXT) * 128 * MIXED
    double, single = (block_bytes(layout.blocks[index], step(0)) for index in (0, -1))
    assert kept_bytes(layout, step(0)) == 2 * double + 3 * single
    assert kept_bytes(layout, step(1)) == 5 * entering
    assert kept_bytes(layout, step(2)) == 3 * entering + double + single
    assert recomputed_bytes(layout, step(1)) == max(double, single) - entering


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != UNCHANGED])
def test_a_quantised_layer_has_the_bytes_of_its_record(precision: str) -> None:
    record = PRECISIONS[precision]
    linear = nn.Linear(1280, 2048).to(torch.bfloat16)
    layer = Layer("layer", 1280, 2048, 1)
    quantised = record.load()(linear, torch.device("cpu"))
    saved = layer.bytes_saved_by(record, unquantised=MIXED)
    assert layer.num_weights * MIXED - saved == _packed_bytes(quantised.weight) + 2048 * MIXED
    kept = (
        Layer("time_emb_proj", 64, 64, 1),
        Layer("x", 40, 64, 1),
        Layer("c", 64, 64, 1, is_convolution=True),
    )
    assert not any(each.bytes_saved_by(record, unquantised=MIXED) for each in kept)
    bare = Layout((), (layer,))
    assert bare.weight_bytes(record, unquantised=MIXED) == layer.num_weights * MIXED


def _packed_bytes(weight: Any) -> int:
    """Bytes of codes, scales and tables."""
    if is_traceable_wrapper_subclass(weight):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    else:
        state = weight.quant_state
        parts = [weight, state.absmax, state.code, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in parts)

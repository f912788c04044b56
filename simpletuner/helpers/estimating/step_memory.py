"""Memory of a training step by part: the denoiser's by `models/memory_model`, and that of training.

Imports no torch. One process, on one device, at the peak of a step; `documentation/memory.md` says what is
not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from math import prod

from simpletuner.helpers.choices.optimizer_states import state_bytes
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.models.memory_model import (
    FLOAT32,
    MIXED,
    Layer,
    Layout,
    LowRank,
    Shape,
    Step,
    kept_bytes,
    recomputed_bytes,
    working_bytes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMemory:
    """Bytes of each part."""

    weights: int
    """The denoiser, without adapters."""
    adapter: int
    """Trained and frozen factors of the adapter."""
    gradients: int
    states: int
    """The optimiser's state."""
    ema: int
    activations: int
    """Kept between forward and backward."""
    recomputed: int
    """Of the block that runs again in the backward pass."""
    working: int
    """Gradients of activations in the backward pass, at most."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """What decides over the memory of a run."""

    layout: Layout
    step: Step
    optimizer: OptimizerConfig
    precision: str = UNCHANGED
    """A name of choices/precisions: the frozen weights under an adapter."""
    has_float32_weights: bool = False
    """Weights in float32 though layers compute in 16 bits; only without an adapter."""
    has_ema: bool = False
    steps_in_backward: bool = False
    """Each weight is stepped as soon as its gradient is complete, and its gradient freed."""
    layer_filter: tuple[str, ...] = ()
    """Of a whole model: patterns in the names of the weights that are trained; none for all."""


def run_memory(setup: TrainingSetup) -> RunMemory:
    """Bytes of each part of a run."""
    step, adapter = setup.step, setup.step.adapter
    is_mixed = step.arithmetic.is_mixed and not setup.has_float32_weights
    weight_bytes = MIXED if is_mixed else FLOAT32
    shapes = (
        whole_shapes(setup.layout, setup.layer_filter)
        if adapter is None
        else adapter_shapes(setup.layout, adapter)
    )
    num_trained = sum(prod(shape) * count for shape, count in shapes.items())
    largest = max(map(prod, shapes), default=0)
    gradient_bytes = weight_bytes if adapter is None else FLOAT32
    return RunMemory(
        weights=setup.layout.weight_bytes(PRECISIONS[setup.precision], unquantised=weight_bytes),
        adapter=0 if adapter is None else _adapter_bytes(num_trained, adapter),
        gradients=gradient_bytes * (largest if setup.steps_in_backward else num_trained),
        states=states_bytes(shapes, setup.optimizer),
        ema=FLOAT32 * num_trained if setup.has_ema else 0,
        activations=kept_bytes(setup.layout, step),
        recomputed=recomputed_bytes(setup.layout, step),
        working=working_bytes(setup.layout, step),
    )


def whole_shapes(layout: Layout, layer_filter: tuple[str, ...]) -> Counter[Shape]:
    """Shape -> number of a denoiser's trained weights of it.

    All weights count if no pattern fits the path of a layer in its block: whole paths are not known here.
    """

    def is_trained(layer: Layer) -> bool:
        return any(re.search(pattern, layer.name) for pattern in layer_filter)

    layers = [layer for block in layout.blocks for layer in block.layers if is_trained(layer)]
    if not layers:
        return layout.shapes
    return Counter(shape for layer in layers for shape in layer.shapes)


def adapter_shapes(layout: Layout, adapter: LowRank) -> Counter[Shape]:
    """Shape -> number of the adapter's trained parameters of it."""
    layers = [layer for block in layout.blocks for layer in block.layers if adapter.adapts(layer)]
    return Counter(shape for layer in layers for shape in adapter.shapes_on(layer))


def _adapter_bytes(num_trained: int, adapter: LowRank) -> int:
    # A T-LoRA keeps the factors that it started from, as large as the trained differences.
    return FLOAT32 * num_trained * (2 if adapter.is_tlora else 1)


def states_bytes(shapes: Counter[Shape], config: OptimizerConfig) -> int:
    """Bytes that an optimiser keeps for float32 parameters of these shapes."""
    return sum(
        count * state_bytes(config.optimizer, shape, config.optimizer_config)
        for shape, count in shapes.items()
    )

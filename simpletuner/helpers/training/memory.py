"""Memory of a run by part: what `models/memory_model` counts of the denoiser, and what belongs to training.

One process, on one device, at the peak of a step. `documentation/memory.md` says what is not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from math import prod

import torch
from torch import nn

from simpletuner.helpers.adapters.trainable import one_group
from simpletuner.helpers.checkpointing.optimizer_state import num_state_bytes
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.models.memory_model import (
    FLOAT32,
    MIXED,
    Layout,
    LowRank,
    Shape,
    Step,
    kept_bytes,
    recomputed_bytes,
    working_bytes,
)
from simpletuner.helpers.training.optimizers import build_optimizer

LARGEST_PROBE = 2**16
"""Numbers of the largest parameter whose state is made in order to count it."""
PROBE_EDGES = (256, 512)
PROBE_SIZES = (2**14, 2**15)
"""Rows or columns of two matrices, and sizes of two vectors, between which a state grows evenly."""


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


def run_memory(setup: TrainingSetup) -> RunMemory:
    """Bytes of each part of a run."""
    step, adapter = setup.step, setup.step.adapter
    is_mixed = step.arithmetic.is_mixed and not setup.has_float32_weights
    weight_bytes = MIXED if is_mixed else FLOAT32
    shapes = setup.layout.shapes if adapter is None else adapter_shapes(setup.layout, adapter)
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


def adapter_shapes(layout: Layout, adapter: LowRank) -> Counter[Shape]:
    """Shape -> number of the adapter's trained parameters of it."""
    layers = [layer for block in layout.blocks for layer in block.layers if adapter.adapts(layer)]
    return Counter(shape for layer in layers for shape in adapter.shapes_on(layer))


def _adapter_bytes(num_trained: int, adapter: LowRank) -> int:
    # A T-LoRA keeps the factors that it started from, as large as the trained differences.
    return FLOAT32 * num_trained * (2 if adapter.is_tlora else 1)


def states_bytes(shapes: Counter[Shape], config: OptimizerConfig) -> int:
    """Bytes that an optimiser keeps for float32 parameters of these shapes.

    The state of a large parameter follows from those of small ones: along each of its first two axes it grows
    evenly, as elements, rows and columns do.

    Raises:
        MissingDependencyError: The optimiser's package is not installed.
    """

    @cache
    def made(shape: Shape) -> int:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer = build_optimizer(one_group("weight", [weight]), config)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        return num_state_bytes(optimizer)

    def extrapolated(shape: Shape, axis: int) -> float:
        low, high = PROBE_SIZES if len(shape) == 1 else PROBE_EDGES
        if prod(shape) <= LARGEST_PROBE or axis == min(len(shape), 2):
            return made(shape)
        if shape[axis] <= high:
            return extrapolated(shape, axis + 1)
        before, after = shape[:axis], shape[axis + 1 :]
        small, large = (extrapolated((*before, edge, *after), axis + 1) for edge in (low, high))
        return small + (large - small) * (shape[axis] - low) / (high - low)

    return round(sum(count * extrapolated(shape, 0) for shape, count in shapes.items()))

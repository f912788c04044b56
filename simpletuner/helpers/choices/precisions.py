"""Formats of frozen weights: the values of `base_model_precision` and of the text encoders' precisions."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.registry import Choice, Registry

UNCHANGED = "no_change"
"""Keeps the weights in the format of mixed_precision."""
TILE = 16
"""Both edges of a quantised layer are multiples of it, as the matrix kernels of GPUs want."""
KEPT_IN_NAMES = "emb"
"""Part of the path of embeddings and their projections, which are small and feed every block."""


@dataclass(frozen=True, kw_only=True)
class Precision(Choice):
    """A format; `build` names a function that quantises one linear layer on a device."""

    row_multiple: int = TILE
    """Inputs of a layer must be a multiple of it, for instance of the weights that share a scale."""
    needs_bypass_mode: bool = False
    """LyCORIS cannot add to these weights, and does not set bypass_mode for them by itself."""
    works_with_group_offload: bool = True
    """Layers can move between host and device."""
    bytes_per_weight: float | None = None
    """Codes and scales of one weight; None for the format of mixed_precision."""
    bytes_per_row: int = 0
    """Scales of one output of a layer."""
    bytes_per_layer: int = 0
    """Tables of one layer."""


_QUANTISATION = "simpletuner.helpers.models.quantisation"

PRECISIONS = Registry(
    Precision(name=UNCHANGED, summary="The format of mixed_precision."),
    Precision(
        name="int8-torchao",
        summary="8-bit integers with a scale per row: half the memory.",
        build=f"{_QUANTISATION}:int8",
        bytes_per_weight=1,
        bytes_per_row=5,  # a float32 scale and an 8-bit zero point
        package="torchao",
        extra="quant",
        needs_bypass_mode=True,
    ),
    Precision(
        name="fp8-torchao",
        summary="8-bit floats (e4m3) with a scale per row: half the memory.",
        build=f"{_QUANTISATION}:fp8",
        bytes_per_weight=1,
        bytes_per_row=4,
        package="torchao",
        extra="quant",
        needs_bypass_mode=True,
    ),
    Precision(
        name="nf4-bnb",
        summary="4-bit codes of a normal distribution with a scale per 64 weights: a quarter of the memory.",
        build=f"{_QUANTISATION}:nf4",
        # 4 bits, an 8-bit scale for 64 weights, and a float32 scale for 256 of those.
        bytes_per_weight=1 / 2 + 1 / 64 + 4 / (64 * 256),
        bytes_per_layer=4 * (16 + 256),  # values of the codes of weights and of scales
        package="bitsandbytes",
        extra="quant",
        row_multiple=64,
        works_with_group_offload=False,
    ),
)

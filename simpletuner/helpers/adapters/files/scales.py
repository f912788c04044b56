"""The scale of a layer in an adapter file: alpha / rank, and the factors that a scale can be folded into.

A layer's tensors are given under the keys of its file, without the layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simpletuner.helpers.errors import AdapterError

_FACTORS = (
    ("p_layer.weight", "base_p"),
    ("lora_up.weight",),
    ("hada_w1_a",),
    ("lokr_w1",),
    ("lokr_w1_a",),
    ("b1.weight", "a1.weight"),
    ("diff", "diff_b"),
    ("w_norm", "b_norm"),
)
"""Of each kind of layer, the tensors whose scaling by c scales the effect by c; the first is always there."""
_RANKED = ("q_layer.weight", "lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "b2.weight")
"""Tensors with the rank on axis 0; a layer without any has none, and readers ignore its alpha."""


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Rank of a layer; None for one without."""
    return next((tensors[key].shape[0] for key in _RANKED if key in tensors), None)


def scale_of(tensors: Mapping[str, Tensor]) -> float:
    """Quotient alpha / rank by which readers multiply a layer; 1 where alpha is not stated or not read."""
    rank = rank_of(tensors)
    return 1.0 if rank is None or "alpha" not in tensors else float(tensors["alpha"]) / rank


def with_multiplier(name: str, tensors: Mapping[str, Tensor], multiplier: float) -> dict[str, Tensor]:
    """A layer whose file has the effect of `multiplier` at multiplier 1: in alpha, else in its factors.

    Raises:
        AdapterError: The effect is not proportional to any tensor: rotations, IA3 and weight_decompose.
    """
    if multiplier == 1:
        return dict(tensors)
    if not _factors_of(tensors) or "dora_scale" in tensors:
        raise AdapterError(
            f"{name}: multiplier {multiplier:g} cannot be stored, because the layer's effect is not "
            "proportional to any of its tensors. Set multiplier to 1."
        )
    if rank_of(tensors) is None or "alpha" not in tensors:
        return rescaled(tensors, multiplier)
    return {**tensors, "alpha": tensors["alpha"] * multiplier}


def rescaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A layer with `factor` times the effect at the same alpha, formed in float32.

    Layers whose effect is proportional to no tensor are returned as they are.
    """
    factors = _factors_of(tensors) if factor != 1 else ()
    return {
        key: tensor.to(torch.float32) * factor if key in factors else tensor
        for key, tensor in tensors.items()
    }


def _factors_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return next((factors for factors in _FACTORS if factors[0] in tensors), ())

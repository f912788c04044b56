"""The scale of a layer in an adapter file: alpha / rank, and the factors that a scale can be folded into.

A layer's tensors are given under the keys of its file, without the layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.helpers.errors import AdapterError


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of layer whose effect is proportional to some of its tensors."""

    factors: tuple[str, ...]
    """Scaling these by c scales the effect by c; those of the layer's first are always present."""
    down: tuple[str, ...] = ()
    """The first of these that is present has the rank on axis 0; without one, readers ignore alpha."""


_KINDS = (
    _Kind(("p_layer.weight", "base_p"), down=("q_layer.weight",)),
    _Kind(("lora_up.weight",), down=("lora_down.weight",)),
    _Kind(("hada_w1_a",), down=("hada_w1_b",)),
    _Kind(("lokr_w1",), down=("lokr_w2_b",)),
    _Kind(("lokr_w1_a",), down=("lokr_w1_b",)),
    _Kind(("b1.weight", "a1.weight"), down=("b2.weight",)),
    _Kind(("diff", "diff_b")),
    _Kind(("w_norm", "b_norm")),
)


def scale_of(tensors: Mapping[str, Tensor]) -> float:
    """Quotient alpha / rank by which readers multiply a layer; 1 where alpha is not stated or not read."""
    kind = _kind_of(tensors)
    rank = _rank_of(kind, tensors) if kind is not None else None
    return 1.0 if rank is None or "alpha" not in tensors else float(tensors["alpha"]) / rank


def with_multiplier(name: str, tensors: Mapping[str, Tensor], multiplier: float) -> dict[str, Tensor]:
    """A layer whose file has the effect of `multiplier` at multiplier 1: in alpha, else in its factors.

    Raises:
        AdapterError: The effect is not proportional to any tensor: rotations, IA3 and weight_decompose.
    """
    if multiplier == 1:
        return dict(tensors)
    kind = _kind_of(tensors)
    if kind is None or "dora_scale" in tensors:
        raise AdapterError(
            f"{name}: multiplier {multiplier:g} cannot be stored, because the layer's effect is not "
            "proportional to any of its tensors. Set multiplier to 1."
        )
    if _rank_of(kind, tensors) is None or "alpha" not in tensors:
        return rescaled(tensors, multiplier)
    return {**tensors, "alpha": tensors["alpha"] * multiplier}


def rescaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A layer with `factor` times the effect at the same alpha, formed in float32.

    Layers whose effect is proportional to no tensor are returned as they are.
    """
    kind = _kind_of(tensors)
    if kind is None or factor == 1:
        return dict(tensors)
    return {
        key: tensor.to(torch.float32) * factor if key in kind.factors else tensor
        for key, tensor in tensors.items()
    }


def _kind_of(tensors: Mapping[str, Tensor]) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.factors[0] in tensors), None)


def _rank_of(kind: _Kind, tensors: Mapping[str, Tensor]) -> int | None:
    return next((tensors[key].shape[0] for key in kind.down if key in tensors), None)

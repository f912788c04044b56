"""Deltas that are no product of two factors, as dense matrices, and their best approximations by a LoRA.

Shapes: R rank, I in (times the kernel of a convolution), O out features, k kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.adapters.files.scales import scale_of
from simpletuner.helpers.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many ranks of a delta are kept: a number, or a share of its energy; every one without either."""

    rank: int | None = None
    energy: float | None = None
    """Share, in (0, 1), of the sum of squared singular values; the smallest rank that reaches it."""

    def choose(self, values: Tensor) -> int:
        """The rank for these singular values, the largest first; at least 1."""
        if self.rank is not None:
            return min(self.rank, values.numel())
        if self.energy is None:
            return values.numel()
        squares = values.double().square()
        # Against the sum itself: a quotient could round to just below a share that is reached.
        missing = squares.cumsum(0) < self.energy * squares.sum()
        return min(int(missing.sum()) + 1, values.numel())

    def all_of(self, rank: int) -> bool:
        """Whether every one of this number of ranks is kept, whatever the singular values."""
        return self.energy is None and (self.rank is None or rank <= self.rank)

    def refuse_invalid(self) -> None:
        """Check the values.

        Raises:
            AdapterError: A value is outside its range, or both are given.
        """
        if self.rank is not None and self.energy is not None:
            raise AdapterError("rank and energy exclude each other. Use one of them.")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank} must be at least 1.")
        if self.energy is not None and not 0 < self.energy < 1:
            raise AdapterError(f"energy {self.energy:g} must be between 0 and 1, for instance 0.95.")


def dense_delta(name: str, parts: Mapping[str, Tensor], *, shape: Sequence[int] | None) -> Tensor:
    """The delta of a LoHa or LoKr layer with its scale, in float64.

    Args:
        name: The layer, for messages.
        parts: Its tensors under LyCORIS's keys.
        shape: Of the layer's weight; None where it is not known.

    Returns:
        [O, I] or [O, I, k, ...].

    Raises:
        AdapterError: The factors have not the weight's size, or do not say their kernel.

    Source: LyCORIS, arXiv:2309.14859: the element-wise product of two products for LoHa, the Kronecker
    product for LoKr, each with a core tensor under `use_tucker`.
    """
    if shape is None and not _says_its_kernel(parts):
        raise AdapterError(
            f"{name}: its factors do not say whether the layer is a convolution. Give the base model with "
            "--model."
        )
    try:
        if "hada_w1_a" in parts:
            delta = _factor(parts, "hada_w1") * _factor(parts, "hada_w2")
        else:
            first, second = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
            if shape is not None:
                second = second.reshape(
                    second.shape[0], shape[1] // first.shape[1], *_kernel(second, shape[2:])
                )
            delta = torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)
        delta = delta * scale_of(parts)
        return delta if shape is None else delta.reshape(tuple(shape))
    except (RuntimeError, KeyError) as error:
        raise AdapterError(f"{name}: its factors do not fit the layer's weight: {error}.") from error


def low_rank_layer(
    path: str, delta: Tensor, *, keep: Keep, dtype: torch.dtype, scale: float = 1.0
) -> LoraLayer:
    """The best approximation to a dense delta as a layer of a LoRA.

    Args:
        path: Path of the layer.
        delta: [O, I, ...].
        keep: The ranks to keep.
        dtype: Dtype of the factors.
        scale: Requested alpha / rank.
    """
    down, up = truncated_dense(delta, keep)
    down, up = down.to(dtype), (up / scale).to(dtype)
    norm = float(delta.double().norm())
    written = (up.double() @ down.double().flatten(1)) * scale
    missing = float((delta.double().flatten(1) - written).norm())
    return LoraLayer(
        path=path,
        down=down.contiguous(),
        up=up.reshape(*up.shape, *(1,) * (delta.ndim - 2)).contiguous(),
        alpha=down.shape[0] * scale,
        error=missing / norm if norm else 0.0,
        folded=1 / scale,
        norm=norm,
    )


def truncated_dense(delta: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    """The two factors of the best approximation, its ranks in the order of their singular values.

    The eigenvectors of the smaller Gram matrix in float64: of them alone the largest are computed, which is
    several times faster than all singular vectors. The delta is projected on them, so that the error is that
    of a projection even where small eigenvalues are lost in rounding.

    Args:
        delta: [O, I, ...].
        keep: The ranks to keep.

    Returns:
        [rank, I, ...] and [O, rank] in float64.

    Source: Eckart & Young 1936.
    """
    matrix = delta.double().flatten(1)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    small = matrix if is_wide else matrix.T
    size = small.shape[0]
    lowest = 0 if keep.rank is None else max(0, size - keep.rank)
    values, vectors = map(
        torch.from_numpy, eigh((small @ small.T).numpy(), subset_by_index=[lowest, size - 1])
    )
    values, vectors = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    vectors = vectors[:, : keep.choose(values)]
    others = vectors.T @ small
    root = others.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    vectors, others = vectors * root, others / root[:, None]
    down, up = (others, vectors) if is_wide else (vectors.T, others.T)
    return down.reshape(-1, *delta.shape[1:]), up


def _factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """One factor of a LoHa or LoKr: whole, a product of two, or these with a core tensor."""
    if name in parts:
        return parts[name].double()
    a, b = parts[f"{name}_a"].double(), parts[f"{name}_b"].double()
    core = parts.get(f"{name[:-1].removesuffix('w')}t{name[-1]}")
    if core is None:
        return a @ b
    return torch.einsum("ij...,ip,jr->pr...", core.double(), a, b).contiguous()  # kron views its arguments


def _kernel(second: Tensor, kernel: Sequence[int]) -> Sequence[int]:
    return second.shape[2:] if second.ndim > 2 else kernel


def _says_its_kernel(parts: Mapping[str, Tensor]) -> bool:
    return "lokr_w2" in parts or bool({"hada_t1", "lokr_t2"} & set(parts))

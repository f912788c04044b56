"""Convert a T-LoRA layer at a fixed rank to the two factors of a LoRA, and measure the error.

Shapes: R rank of a layer, r active rank, I in (times the kernel of a convolution), O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.delta import product_norm
from simpletuner.helpers.adapters.tlora.stored_layer import StoredLayer

ChooseRank = Callable[[Tensor], int]


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer of a LoRA, whose delta is alpha / rank * up @ down."""

    path: str
    """Path of the adapted layer in the denoiser, with dots."""
    down: Tensor
    """[rank, I] or [rank, I, k, k]."""
    up: Tensor
    """[O, rank] or [O, rank, 1, 1]."""
    alpha: float
    error: float
    """Frobenius norm of the difference from the live layer's delta, relative to the latter's."""
    folded: float = 1.0
    """Factor in `up` that makes alpha / rank the requested scale."""
    norm: float = 0.0
    """Frobenius norm of the live layer's delta; 0 in an export, which needs none."""

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]


def exact_lora(
    path: str, layer: StoredLayer, *, rank: int, dtype: torch.dtype, scale: float = 1.0
) -> LoraLayer:
    """The layer with r active ranks as a LoRA of rank 2r, r for a vanilla one; rounding is the only error.

    The factors are those of the differences: [P lambda, -P0 lambda0] and [Q; Q0] would leave two large
    products to cancel, which bf16 cannot.

    Args:
        path: Path of the layer.
        layer: The layer in the file.
        rank: r.
        dtype: Dtype of the factors.
        scale: Requested alpha / rank; the rest of the layer's own scale goes into `up`.
    """
    a, b = layer.factors_at(rank)
    return _converted(path, (a, b), live=(a, b), dtype=dtype, scales=(layer.scale, scale))


def truncated_lora(
    path: str, layer: StoredLayer, *, rank: int, dtype: torch.dtype, scale: float = 1.0
) -> LoraLayer:
    """The best approximation of rank r to the layer with r active ranks; arguments as for `exact_lora`.

    Source: Eckart & Young 1936; the singular vectors by QR of both factors, no matrix of size O x I.
    """
    a, b = layer.factors_at(rank)
    written = (a, b) if a.shape[0] <= rank else truncated_product(a, b, lambda _: rank)
    return _converted(path, written, live=(a, b), dtype=dtype, scales=(layer.scale, scale))


def truncated_product(a: Tensor, b: Tensor, choose: ChooseRank) -> tuple[Tensor, Tensor]:
    """The best approximation of a lower rank to `b @ a`, its ranks in the order of their singular values.

    Args:
        a: [n, I, ...].
        b: [O, n].
        choose: The rank, from the singular values, the largest first.

    Returns:
        [rank, I, ...] and [O, rank] in float64; each takes the root of the singular values.
    """
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().flatten(1).T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rank = min(choose(values), values.numel())
    root = values[:rank].sqrt()
    down = (root[:, None] * (right @ vh[:rank].T).T).view(rank, *a.shape[1:])
    return down, left @ u[:, :rank] * root


def relative_error(live: tuple[Tensor, Tensor], written: tuple[Tensor, Tensor]) -> float:
    """||B A - B' A'|| / ||B A|| in float64, without forming a product; 0 for a delta that is 0.

    Args:
        live: A [n, I, ...] and B [O, n].
        written: A' [m, I, ...] and B' [O, m].
    """
    if all(_are_equal(*pair) for pair in zip(live, written, strict=True)):
        return 0.0
    (a, b), (a2, b2) = ((first.double().flatten(1), second.double()) for first, second in (live, written))
    if a.shape == a2.shape:  # one term for each factor's rounding, so no large terms cancel
        missing = product_norm(torch.cat([a - a2, a2]), torch.cat([b, b - b2], dim=1))
    else:
        missing = product_norm(torch.cat([a, a2]), torch.cat([b, -b2], dim=1))
    whole = float(product_norm(a, b))
    return float(missing) / whole if whole else 0.0


def errors_by_rank(layer: StoredLayer, written: LoraLayer, *, gains: Sequence[float] = ()) -> list[float]:
    """The `relative_error` of a LoRA against the live layer with 1, 2, ... R active ranks.

    One table of inner products gives them all: activating a rank adds its terms to the delta.

    Args:
        layer: The layer in the file.
        written: Its LoRA.
        gains: Factor of the live delta with 1, 2, ... R active ranks; 1 without any.
    """
    a, b = (factor.double().flatten(1) for factor in layer.factors_at(layer.rank))
    a2, b2 = written.down.double().flatten(1), written.up.double().flatten(1) / written.folded
    terms = a.shape[0] // layer.rank  # a rank's own and its base's
    table = ((b.T @ b) * (a @ a.T)).view(terms, layer.rank, terms, layer.rank).sum((0, 2))
    shared = ((b.T @ b2) * (a @ a2.T)).sum(1).view(terms, layer.rank).sum(0)
    gain = torch.tensor(gains or [1.0] * layer.rank, dtype=torch.float64)
    whole = gain**2 * table.cumsum(0).cumsum(1).diagonal()
    missing = (whole - 2 * gain * shared.cumsum(0) + product_norm(a2, b2) ** 2).clamp(min=0)
    return (missing / whole).sqrt().nan_to_num(nan=0.0, posinf=torch.inf).tolist()


def lora_layer(
    path: str,
    factors: tuple[Tensor, Tensor],
    *,
    live: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    scales: tuple[float, float],
) -> LoraLayer:
    """A layer of a LoRA with its error and the norm of its delta.

    Args:
        path: Path of the layer.
        factors: A [rank, I, ...] and B [O, rank] to write.
        live: A and B that they stand for.
        dtype: Dtype of the written factors.
        scales: Scale of both products, and the requested alpha / rank.
    """
    layer = _converted(path, factors, live=live, dtype=dtype, scales=scales)
    return replace(layer, norm=abs(scales[0]) * float(product_norm(live[0].double(), live[1].double())))


def _converted(
    path: str,
    factors: tuple[Tensor, Tensor],
    *,
    live: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    scales: tuple[float, float],
) -> LoraLayer:
    """`lora_layer` without the norm, which costs more than all the rest."""
    own, scale = scales
    folded = own / scale
    down, up, exact_up = factors[0].to(dtype), factors[1].to(dtype), live[1]
    if folded != 1:
        up, exact_up = (factors[1].double() * folded).to(dtype), live[1].double() * folded
    return LoraLayer(
        path=path,
        down=down.contiguous(),
        up=up.reshape(*up.shape, *(1,) * (down.ndim - 2)).contiguous(),
        alpha=down.shape[0] * scale,
        error=relative_error((live[0], exact_up), (down, up)),
        folded=folded,
    )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any dtypes hold the same values."""
    return torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.double(), other.double())

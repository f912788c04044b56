"""Arithmetic on the two factors of a delta.

Shapes: R rank of the factors, I in, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALVINGS = 24


Triplet = tuple[Tensor, Tensor, Tensor]


def difference_factors(base: Triplet, difference: Triplet, *, rank: int | None) -> tuple[Tensor, Tensor]:
    """Two factors whose product is P diag(lambda) Q - P0 diag(lambda0) Q0 over the first `rank` ranks.

    The product is exactly zero where the differences are zero, in every dtype.

    Args:
        base: Q0 [R, I, ...], P0 [O, R], lambda0 [R].
        difference: dQ, dP, dlambda of the same shapes; Q is Q0 + dQ and so on.
        rank: r; None for every rank.

    Returns:
        A [2r, I, ...] and B [O, 2r].
    """
    (base_q, base_p, base_lambda), (delta_q, delta_p, delta_lambda) = base, difference
    column = (-1,) + (1,) * (delta_q.ndim - 1)
    base_lambda, delta_lambda = base_lambda[:rank].view(column), delta_lambda[:rank].view(column)
    delta_q = delta_q[:rank]
    q = base_q[:rank] + delta_q
    a = torch.cat([(base_lambda + delta_lambda) * q, base_lambda * delta_q + delta_lambda * q])
    return a, torch.cat([delta_p[:, :rank], base_p[:, :rank]], dim=1)


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of `b @ a` for a [R, I, ...] and b [O, R], without forming the product."""
    a = a.flatten(1)
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def ungrouped(a: Tensor, *, groups: int, rank: int) -> Tensor:
    """Expand a grouped convolution's first factor, [R', I/g, ...], to an ungrouped one, [R', I, ...].

    Args:
        a: Stacked parts of `rank` rows each; row j of a part reads input group j // (rank / groups).
        groups: g of the convolution.
        rank: Rows of a part, a multiple of g.
    """
    if groups == 1:
        return a
    rows = torch.arange(a.shape[0], device=a.device)
    dense = a.new_zeros(a.shape[0], groups, *a.shape[1:])
    dense[rows, rows % rank // (rank // groups)] = a
    return dense.flatten(1, 2)


@torch.no_grad()
def shrink(parameters: Sequence[Tensor], *, norm: Callable[[], Tensor], limit: float) -> tuple[bool, Tensor]:
    """Scale the parameters in place by the largest common share that keeps `norm()` within the limit.

    The norm must be continuous in that share, and 0 where the parameters are 0.

    Returns:
        Whether the parameters were scaled, and the norm afterwards.
    """
    before = norm()
    if before <= limit:
        return False, before
    start = [parameter.clone() for parameter in parameters]
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        _scale_to(parameters, start, share=share)
        low, high = (share, high) if norm() <= limit else (low, share)
    _scale_to(parameters, start, share=low)
    return True, norm()


def _scale_to(parameters: Sequence[Tensor], start: Sequence[Tensor], *, share: float) -> None:
    for parameter, value in zip(parameters, start, strict=True):
        parameter.copy_(value * share)

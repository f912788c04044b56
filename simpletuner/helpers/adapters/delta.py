"""Arithmetic on a delta that is given by its two factors.

Shapes: R rank of the factors, I in, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALVINGS = 24


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of `b @ a` for a [R, I, ...] and b [O, R], without forming the product."""
    a = a.flatten(1)
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def ungrouped(a: Tensor, *, groups: int, rank: int) -> Tensor:
    """A grouped convolution's first factor, [R', I/g, ...], as one that reads every input, [R', I, ...].

    Args:
        a: Stacked parts of `rank` rows each; row j of a part reads input group j // (rank / groups).
        groups: g of the convolution.
        rank: Rows of a part, a multiple of g.
    """
    if groups == 1:
        return a
    rows = torch.arange(a.shape[0], device=a.device)
    spread = a.new_zeros(a.shape[0], groups, *a.shape[1:])
    spread[rows, rows % rank // (rank // groups)] = a
    return spread.flatten(1, 2)


@torch.no_grad()
def shrink(parameters: Sequence[Tensor], *, norm: Callable[[], Tensor], limit: float) -> tuple[bool, Tensor]:
    """Scale the parameters in place by the largest common share that brings `norm()` to the limit.

    The norm must be continuous in that share, and 0 where the parameters are 0.

    Returns:
        Whether anything was scaled, and the norm afterwards.
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

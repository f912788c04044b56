"""The branch of a T-LoRA layer on a linear one, with its gradients in closed form.

    y = output + m (x A') B',   A = [ Q ; lambda0 dQ + dlambda Q ],   B = s [ lambda dP, P0 ]

It is the contract's product with lambda moved from the first half of A to that of B, so that u = x Q' is at
hand in backward: with g the gradient of y, and v = g s (P0 + dP)',

    g_x = m (g B) A,    g_dQ = (m lambda v)' x,    g_dlambda = columns of (v * m u) summed,
    g_dP = s lambda g' m u

Nothing is computed for the frozen factors. Narrow layers cost the host's time, call by call: calls are few.

Shapes: M rows of x over all leading axes, B samples, R rank, r active rank, I in features, O out features.
Source: T-LoRA, arXiv:2507.05964.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpletuner.helpers.adapters.tlora.delta import Triplet


class Branch(NamedTuple):
    """What a layer's branch has besides the tensors with gradients."""

    base: Triplet
    """Q0 [R, I], P0 [O, R], lambda0 [R]."""
    rank: int
    """r, the ranks that are computed."""
    rank_mask: Tensor | None
    """m: [1, R] or [B, R]; None computes the first r ranks alike for all samples."""
    scale: float
    """s, the strength with everything in it."""


def add_branch(branch: Branch, x: Tensor, *, output: Tensor, differences: Triplet) -> Tensor:
    """The output with the branch added.

    Args:
        branch: Frozen factors, mask and strength.
        x: [B, I] or [B, ..., I].
        output: The base layer's output for x.
        differences: dQ [R, I], dP [O, R], dlambda [R]; float32.
    """
    return cast(Tensor, _AddBranch.apply(branch, x, output, *differences))  # type: ignore[no-untyped-call]


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Branch, *tensors: Tensor) -> Tensor:
        x, output, *differences = tensors
        base_q, base_p, base_lambda = _first_ranks(branch.base, branch.rank)
        delta_q, delta_p, delta_lambda = _first_ranks(differences, branch.rank)
        q, values = base_q + delta_q, base_lambda + delta_lambda
        a = torch.cat([q, (base_lambda[:, None] * delta_q).addcmul_(delta_lambda[:, None], q)])
        b = torch.cat([delta_p * values, base_p, base_p + delta_p], dim=1)  # the last third is for backward
        if branch.scale != 1.0:
            b.mul_(branch.scale)
        dtype = _product_dtype(x)
        a, b, rows = a.to(dtype), b.to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
        hidden = _masked(rows.mm(a.t()), branch)
        ctx.branch = branch
        # A is for the gradient of x alone, which text does not need.
        ctx.save_for_backward(rows, hidden, a if ctx.needs_input_grad[1] else None, b, values)
        factor = b[:, : 2 * branch.rank].t()
        if output.dtype != dtype:
            return output + hidden.mm(factor).view(output.shape).to(output.dtype)
        return torch.addmm(output.reshape(-1, output.shape[-1]), hidden, factor).view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, a, b, values = ctx.saved_tensors
        branch: Branch = ctx.branch
        _, needs_x, _, needs_q, needs_p, needs_lambda = ctx.needs_input_grad
        rank, closed = branch.rank, branch.base[2].shape[0] - branch.rank
        incoming = gradients[0].reshape(-1, b.shape[0]).to(b.dtype)  # g, [M, O]
        parts = incoming.mm(b)  # [M, 3r]
        v, u = parts[:, 2 * rank :], hidden[:, :rank]
        of_x = of_q = of_p = of_lambda = None
        if needs_lambda:
            of_lambda = _padded((v * u).sum(0, dtype=values.dtype), closed)
        parts = _masked(parts, branch)
        scales = values.to(b.dtype)
        if needs_x:
            of_x = parts[:, : 2 * rank].mm(a).view(*gradients[0].shape[:-1], rows.shape[1])
        if needs_q:
            of_q = _padded((v * scales).t().mm(rows).to(values.dtype), 0, closed)
        if needs_p:
            product = incoming.t().mm(u * scales).to(values.dtype)
            of_p = _padded(product if branch.scale == 1.0 else product.mul_(branch.scale), closed)
        return None, of_x, gradients[0], of_q, of_p, of_lambda


def _padded(gradient: Tensor, *closed: int) -> Tensor:
    """Zeros behind the last axis, or behind the one before it: the gradient of ranks that are not active."""
    return F.pad(gradient, [end for number in closed for end in (0, number)]) if any(closed) else gradient


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's products: the autocast one where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _first_ranks(factors: Any, rank: int) -> Triplet:
    """[r, I], [O, r] and [r]: the first r ranks of [R, I], [O, R] and [R]."""
    q, p, values = factors
    return (q, p, values) if rank == values.shape[0] else (q[:rank], p[:, :rank], values[:rank])


def _masked(hidden: Tensor, branch: Branch) -> Tensor:
    """[M, k r], in place times the mask of each row's sample."""
    if (mask := branch.rank_mask) is not None:
        hidden.view(len(mask), -1, hidden.shape[1] // branch.rank, branch.rank).mul_(mask[:, None, None])
    return hidden

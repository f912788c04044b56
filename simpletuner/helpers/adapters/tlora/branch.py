"""The branch of a T-LoRA layer on a linear one, with its gradients in closed form.

    y = output + s (m x A') B',   A = [ lambda Q ; lambda0 dQ + dlambda Q ],   B = [ dP, P0 ]

With g the gradient of y, h = s m x A' and v = s m g (dP + P0), a sum of the two halves of s m g B,

    g_x = s (m g B) A,    g_dQ = lambda v' x,    g_dlambda = rows of (v' x) * Q summed,    g_dP = g' h[:, :r]

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
from simpletuner.helpers.adapters.tlora.forming import Formed


class Branch(NamedTuple):
    """What a layer's branch has besides its factors."""

    max_rank: int
    """R."""
    rank_mask: Tensor | None
    """m: [1, R] or [B, R]; None computes the r ranks alike for all samples."""
    scale: float
    """s, the strength with everything in it."""


def add_branch(branch: Branch, x: Tensor, *, output: Tensor, formed: Formed, differences: Triplet) -> Tensor:
    """The output with the branch added.

    Args:
        branch: Mask and strength.
        x: [B, I] or [B, ..., I].
        output: The base layer's output for x.
        formed: Factors over the r ranks that are computed.
        differences: dQ [R, I], dP [O, R], dlambda [R] of which they were formed.
    """
    return cast(Tensor, _AddBranch.apply(branch, formed, x, output, *differences))  # type: ignore[no-untyped-call]


def add_factors(
    x: Tensor, output: Tensor, *, a: Tensor, b: Tensor, rank_mask: Tensor | None, strength: float
) -> Tensor:
    """The output with x A' B' added, differentiated by autograd.

    Args:
        x: [B, I] or [B, ..., I].
        output: The base layer's output for x.
        a: [r, I] with as many rows as B has columns.
        b: [O, r].
        rank_mask: [B, r] or [1, r]; None for none.
        strength: Factor of the product.
    """
    hidden = F.linear(x, a)
    if rank_mask is not None:
        # [B, 1, r]: without the token axis torch would mask tokens whenever N == B.
        hidden = hidden * rank_mask.to(hidden.dtype).view(len(rank_mask), *(1,) * (hidden.ndim - 2), -1)
    b = b.to(hidden.dtype)
    if hidden.dtype != output.dtype:
        return output + F.linear(hidden, b * strength).to(output.dtype)
    rows, hidden = output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    return torch.addmm(rows, hidden, b.t(), alpha=strength).view(output.shape)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's products: the autocast one where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Branch, formed: Formed, *tensors: Tensor) -> Tensor:
        x, output, *_ = tensors
        a, b, q, values = formed
        rows = x.reshape(-1, x.shape[-1]).to(b.dtype)
        hidden = _scaled(rows.mm(a.t()), branch)
        ctx.branch = branch
        # A is for the gradient of x alone, which text does not need.
        ctx.save_for_backward(rows, hidden, a if ctx.needs_input_grad[2] else None, b, q, values)
        if output.dtype != b.dtype:
            return output + hidden.mm(b.t()).view(output.shape).to(output.dtype)
        return torch.addmm(output.reshape(-1, output.shape[-1]), hidden, b.t()).view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, a, b, q, values = ctx.saved_tensors
        _, _, needs_x, _, needs_q, needs_p, needs_lambda = ctx.needs_input_grad
        rank, closed = len(q), ctx.branch.max_rank - len(q)
        incoming = gradients[0].reshape(-1, len(b)).to(b.dtype)  # g, [M, O]
        parts = _scaled(incoming.mm(b), ctx.branch)  # [M, 2r]
        of_x = of_q = of_p = of_lambda = None
        if needs_x:
            of_x = parts.mm(a).view(*gradients[0].shape[:-1], rows.shape[1])
        if needs_q or needs_lambda:
            product = (parts[:, :rank] + parts[:, rank:]).t().mm(rows).to(values.dtype)  # v' x, [r, I]
            of_lambda = _padded((product * q).sum(1), closed) if needs_lambda else None
            of_q = _padded(product.mul_(values), 0, closed)
        if needs_p:
            of_p = _padded(incoming.t().mm(hidden[:, :rank]).to(values.dtype), closed)
        return None, None, of_x, gradients[0], of_q, of_p, of_lambda


def _padded(gradient: Tensor, *closed: int) -> Tensor:
    """Zeros behind the last axis, or behind the one before it: the gradient of ranks that are not active."""
    return F.pad(gradient, [end for number in closed for end in (0, number)]) if any(closed) else gradient


def _scaled(hidden: Tensor, branch: Branch) -> Tensor:
    """[M, 2r], in place times the mask of each row's sample and the strength."""
    if (mask := branch.rank_mask) is not None:
        hidden.view(len(mask), -1, 2, hidden.shape[1] // 2).mul_(mask[:, None, None])
    return hidden if branch.scale == 1.0 else hidden.mul_(branch.scale)

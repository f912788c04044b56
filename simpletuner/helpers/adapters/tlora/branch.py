"""The branch of a T-LoRA layer on a linear one, with its gradients in closed form.

    y = output + x A' diag(m, m) (s B)',   A = [ lambda Q ; lambda0 dQ + dlambda Q ],   B = [ dP, P0 ]

Both halves of A have the same derivatives, so the sum G of their gradients gives those of dQ and dlambda in
one product, and nothing is computed for the frozen factors:

    g_dQ = lambda G,    g_dlambda = rows of (G * Q) summed,    g_dP = the first half of g_B

Narrow layers cost the host's time, call by call. Therefore parts of the factors are taken with `as_strided`,
a third of the calls of `narrow`, and the three gradients are parts of one tensor.

Shapes: M rows of x over all leading axes, B samples, R rank, r active rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpletuner.helpers.adapters.tlora.delta import Triplet


@dataclass(frozen=True, slots=True)
class Branch:
    """What a layer's branch has besides the tensors with gradients."""

    base: Triplet
    """Q0 [R, I], P0 [O, R], lambda0 [R]."""
    rank: int
    """r, the ranks that are computed."""
    rank_mask: Tensor | None
    """[1, R] or [B, R]; None computes the first r ranks alike for all samples."""
    scale: float
    """s, the strength with everything in it."""

    def masked(self, hidden: Tensor) -> Tensor:
        """[M, 2r] times the mask of each row's sample, in place."""
        if self.rank_mask is not None:
            samples = self.rank_mask.shape[0]
            halves = hidden.view(samples, -1, 2, self.rank)
            halves.mul_(self.rank_mask.view(samples, 1, 1, self.rank))
        return hidden


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
        dtype = _product_dtype(x)
        base_q, base_p, base_lambda = _parts(branch.base, branch.rank)
        delta_q, delta_p, delta_lambda = _parts(differences, branch.rank)
        q, values = base_q + delta_q, base_lambda + delta_lambda
        a = torch.cat([values * q, (base_lambda * delta_q).addcmul_(delta_lambda, q)])
        b = torch.cat([delta_p, base_p], dim=1)
        if branch.scale != 1.0:
            b.mul_(branch.scale)
        a, b, x = _cast(a, dtype), _cast(b, dtype), _cast(x, dtype)
        rows = x.reshape(-1, x.shape[-1])
        hidden = branch.masked(rows.mm(_transposed(a)))
        ctx.branch = branch
        # A is for the gradient of x alone, which text does not need.
        ctx.save_for_backward(rows, hidden, a if ctx.needs_input_grad[1] else None, b, q, values)
        if output.dtype != dtype:
            return output + hidden.mm(_transposed(b)).view(output.shape).to(output.dtype)
        total = torch.addmm(output.reshape(-1, output.shape[-1]), hidden, _transposed(b))
        return total.view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, a, b, q, values = ctx.saved_tensors
        branch: Branch = ctx.branch
        _, needs_x, _, needs_q, needs_p, needs_lambda = ctx.needs_input_grad
        incoming = _cast(gradients[0], b.dtype).reshape(-1, b.shape[0])  # [M, O]
        of_hidden = branch.masked(incoming.mm(b))  # [M, 2r]
        of_x = of_hidden.mm(a).view(*gradients[0].shape[:-1], rows.shape[1]) if needs_x else None
        wholes = _gradients(branch, q)
        part_q, part_p, part_lambda = _parts(wholes, branch.rank)
        if needs_q or needs_lambda:
            first, second = _halves(of_hidden)
            product = _transposed(first + second).mm(rows)  # G [r, I]
            torch.mul(product, values, out=part_q)
            torch.sum(product * q, 1, keepdim=True, out=part_lambda)
        if needs_p:
            part_p.copy_(_transposed(incoming).mm(_halves(hidden)[0]))
            if branch.scale != 1.0:
                part_p.mul_(branch.scale)
        needed = zip(wholes, (needs_q, needs_p, needs_lambda), strict=True)
        return None, of_x, gradients[0], *(whole if is_needed else None for whole, is_needed in needed)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's products: the autocast one where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.as_strided(matrix.shape[::-1], matrix.stride()[::-1])


def _halves(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """[M, 2r] as two of [M, r]."""
    first, second = torch.split(hidden, hidden.shape[1] // 2, dim=1)
    return first, second


def _parts(factors: Sequence[Tensor], rank: int) -> Triplet:
    """[r, I], [O, r] and [r, 1]: the first r ranks of [R, I], [O, R] and [R]."""
    q, p, values = factors
    if rank < values.shape[0]:
        q, p = q.as_strided((rank, q.shape[1]), q.stride()), p.as_strided((p.shape[0], rank), p.stride())
    return q, p, values.as_strided((rank, 1), (values.stride(0), 1))


def _gradients(branch: Branch, q: Tensor) -> Triplet:
    """Gradients of dQ, dP and dlambda, zero for the ranks that are not active; one tensor has all of them."""
    shapes = [factor.shape for factor in branch.base]
    sizes = [shape.numel() for shape in shapes]
    make = torch.empty if branch.rank == sizes[2] else torch.zeros
    together = make(sum(sizes), dtype=q.dtype, device=q.device)
    of_q, of_p, of_lambda = torch.split(together, sizes)
    return of_q.view(shapes[0]), of_p.view(shapes[1]), of_lambda

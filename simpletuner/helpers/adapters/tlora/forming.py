"""The two factors of a T-LoRA layer's branch, formed for many layers by a few operations.

    A = [ lambda Q ; lambda0 dQ + dlambda Q ],   B = [ dP, P0 ],   Q = Q0 + dQ,   lambda = lambda0 + dlambda

over the first r ranks. A small layer costs the host's time, call by call. So the A of small layers with as
many inputs are formed together, as [L, 2r, I], and the B of those with as many outputs, by nodes of the graph
whose backward pass turns the gradients of A and B into those of the parameters:

    W = the two halves of g_A added,   g_dQ = lambda W,   g_dlambda = rows of W * Q summed,
    g_dP = g_B[:, :r]

Shapes: L layers, R rank, r active rank, I in features, O out features.
Source: T-LoRA, arXiv:2507.05964.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpletuner.helpers.adapters.tlora.delta import Triplet

SMALL_BYTES = 512 * 2**10
"""Of A and B: a larger layer's arithmetic takes longer than its calls."""
KEPT_BYTES = 32 * 2**20
"""Of the layers formed at once: what is held through a step besides what autograd keeps."""


class Formed(NamedTuple):
    """What the forward and backward pass of a layer read of its factors, without a graph."""

    a: Tensor
    """[2r, I] in the products' dtype."""
    b: Tensor
    """[O, 2r] in the products' dtype."""
    q: Tensor
    """Q [r, I] in the products' dtype, for the gradient of lambda."""
    values: Tensor
    """lambda [r, 1] in the parameters' dtype."""


class Factors(Protocol):
    """A linear T-LoRA layer."""

    shape: tuple[int, ...]
    """O and I."""

    @property
    def base(self) -> Triplet:
        """Q0 [R, I], P0 [O, R], lambda0 [R]."""

    @property
    def differences(self) -> Triplet:
        """The trained dQ [R, I], dP [O, R], dlambda [R]."""


def form(base: Triplet, differences: Triplet, *, rank: int, dtype: torch.dtype) -> Formed:
    """The factors of one layer.

    Args:
        base: Q0 [R, I], P0 [O, R], lambda0 [R].
        differences: dQ, dP and dlambda of the same shapes.
        rank: r.
        dtype: Of the products.
    """
    with torch.no_grad():
        a, q, values = _first_factor(base[::2], differences[::2], rank)
        b = torch.cat([differences[1][:, :rank], base[1][:, :rank]], dim=1)
        return Formed(a.to(dtype), b.to(dtype), q.to(dtype), values)


def _first_factor(base: tuple[Tensor, ...], differences: tuple[Tensor, ...], rank: int) -> Triplet:
    """A [..., 2r, I], Q [..., r, I] and lambda [..., r, 1] of one layer, or of [L, ...].

    Args:
        base: Q0 and lambda0.
        differences: dQ and dlambda.
        rank: r.
    """
    (base_q, base_lambda), (delta_q, delta_lambda) = base, differences
    if rank < base_lambda.shape[-1]:
        base_q, delta_q = base_q[..., :rank, :], delta_q[..., :rank, :]
        base_lambda, delta_lambda = base_lambda[..., :rank], delta_lambda[..., :rank]
    base_lambda, delta_lambda = base_lambda[..., None], delta_lambda[..., None]
    q, values = base_q + delta_q, base_lambda + delta_lambda
    second = (base_lambda * delta_q).add_(delta_lambda * q)
    return torch.cat([values * q, second], dim=-2), q, values


class FormedOfStep:
    """The factors of neighbouring small layers, while the parameters stay as they are."""

    def __init__(self) -> None:
        self._factors: dict[torch.dtype, dict[Factors, tuple[Tensor, Tensor]]] = {}

    def of(
        self, layer: Factors, others: Iterable[Factors], *, rank: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """A [2r, I] and B [O, 2r] of a layer, with a graph; None for a layer that is not small.

        When they are not at hand, those of the layers around it are formed too.

        Args:
            layer: The layer.
            others: All layers of its rank, in the order of the network.
            rank: r, the same in every call.
            dtype: Of the products.
        """
        factors = self._factors.setdefault(dtype, {})
        if (found := factors.get(layer)) is not None:
            return found
        if _num_bytes(layer, rank, dtype) > SMALL_BYTES:
            return None
        factors.clear()  # before others are made
        chosen = [
            _Chosen(each, each.base, each.differences)
            for each in _neighbours(layer, others, rank=rank, dtype=dtype)
        ]
        first: dict[Factors, Tensor] = {}
        for group in _alike(chosen, edge=1):
            parameters = [tensor for each in group for tensor in each.differences[::2]]
            bases = [(each.base[0], each.base[2]) for each in group]
            formed = _FormA.apply(_Bases(bases, rank, dtype), *parameters)  # type: ignore[no-untyped-call]
            first.update(zip((each.layer for each in group), formed, strict=True))
        for group in _alike(chosen, edge=0):
            parameters = [each.differences[1] for each in group]
            frozen = [(each.base[1],) for each in group]
            formed = _FormB.apply(_Bases(frozen, rank, dtype), *parameters)  # type: ignore[no-untyped-call]
            factors.update(
                (each.layer, (first[each.layer], b)) for each, b in zip(group, formed, strict=True)
            )
        return factors[layer]


class _Chosen(NamedTuple):
    layer: Factors
    base: Triplet
    differences: Triplet


def _alike(layers: Sequence[_Chosen], *, edge: int) -> Iterable[list[_Chosen]]:
    """The layers with as many outputs (edge 0) or inputs (edge 1)."""
    found: dict[int, list[_Chosen]] = {}
    for each in layers:
        found.setdefault(each.layer.shape[edge], []).append(each)
    return found.values()


def _neighbours(layer: Factors, others: Iterable[Factors], *, rank: int, dtype: torch.dtype) -> list[Factors]:
    """The layer and the small ones around it that are trained alike on its device.

    The network is divided into the same parts whichever layer is asked for: gradient checkpointing asks for
    its blocks from the last to the first.
    """
    wanted = layer.differences[0]
    device, is_trained = wanted.device, wanted.requires_grad
    part: list[Factors] = []
    size, is_found = 0, False
    for other in others:
        own, delta_q = _num_bytes(other, rank, dtype), other.differences[0]
        is_alike = delta_q.device == device and delta_q.requires_grad == is_trained
        if own > SMALL_BYTES or not is_alike:
            continue
        if size + own > KEPT_BYTES:
            if is_found:
                break
            part, size = [], 0
        part.append(other)
        size += own
        is_found = is_found or other is layer
    return part if is_found else [layer]


def _num_bytes(layer: Factors, rank: int, dtype: torch.dtype) -> int:
    """Bytes of A and B."""
    return 2 * rank * sum(layer.shape) * dtype.itemsize


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As torch.stack, which makes a view of each tensor first."""
    return torch.cat(list(tensors)).view(len(tensors), *tensors[0].shape)


def _stacked_gradients(gradients: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """[L, ...], with zeros for the layers that took no part in the loss."""
    zeros = torch.zeros_like(next(each for each in gradients if each is not None))
    return _stacked([zeros if each is None else each for each in gradients]).to(dtype)


class _Bases(NamedTuple):
    """What nodes read besides the parameters."""

    factors: Sequence[tuple[Tensor, ...]]
    """Frozen ones of each layer."""
    rank: int
    dtype: torch.dtype


class _FormA(torch.autograd.Function):
    """The A [2r, I] of L layers with as many inputs; of their dQ and dlambda in turn."""

    @staticmethod
    def forward(ctx: Any, bases: _Bases, *parameters: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        base = tuple(map(_stacked, zip(*bases.factors, strict=True)))
        delta_q, delta_lambda = _stacked(parameters[::2]), _stacked(parameters[1::2])
        a, q, values = _first_factor(base, (delta_q, delta_lambda), bases.rank)
        ctx.kept = q.to(bases.dtype), values, delta_lambda.shape[1] - bases.rank
        return a.to(bases.dtype).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(each is None for each in gradients):
            return (None,) * (1 + 2 * len(gradients))
        q, values, closed = ctx.kept
        of_a, rank = _stacked_gradients(gradients, values.dtype), values.shape[1]
        product = of_a[:, :rank] + of_a[:, rank:]
        of_lambda = F.pad((product * q).sum(-1), [0, closed])
        of_q = F.pad(product.mul_(values), [0, 0, 0, closed])
        found = zip(gradients, of_q.unbind(), of_lambda.unbind(), strict=True)
        pairs = ((None, None) if given is None else pair for given, *pair in found)
        return (None, *(tensor for pair in pairs for tensor in pair))


class _FormB(torch.autograd.Function):
    """The B [O, 2r] of L layers with as many outputs; of their dP."""

    @staticmethod
    def forward(ctx: Any, bases: _Bases, *parameters: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        (base_p,) = map(_stacked, zip(*bases.factors, strict=True))
        delta_p, rank = _stacked(parameters), bases.rank
        ctx.kept = rank, delta_p.shape[2] - rank, delta_p.dtype
        return torch.cat([delta_p[..., :rank], base_p[..., :rank]], dim=-1).to(bases.dtype).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(each is None for each in gradients):
            return (None,) * (1 + len(gradients))
        rank, closed, dtype = ctx.kept
        of_p = F.pad(_stacked_gradients(gradients, dtype)[..., :rank], [0, closed])
        found = zip(gradients, of_p.unbind(), strict=True)
        return (None, *(None if given is None else tensor for given, tensor in found))

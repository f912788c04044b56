"""The branch's own backward pass against automatic differentiation of the plain formula."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.branch import Branch, add_branch, product_dtype
from simpletuner.helpers.adapters.tlora.delta import Triplet, difference_factors
from simpletuner.helpers.adapters.tlora.forming import form
from simpletuner.helpers.adapters.tlora.rank_schedule import rank_rows

RANK, COLUMNS, ROWS, SAMPLES = 6, 10, 14, 3


def triplet(seed: int, *, size: float = 1.0) -> Triplet:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * size

    return draw(RANK, COLUMNS), draw(ROWS, RANK), draw(RANK)


class Case(NamedTuple):
    """A layer's frozen factors and mask."""

    base: Triplet
    rank: int
    rank_mask: Tensor | None
    scale: float


def plain(case: Case, x: Tensor, *, output: Tensor, differences: Triplet) -> Tensor:
    """The formula of the contract, differentiated by autograd."""
    a, b = difference_factors(case.base, differences, rank=case.rank)
    hidden = x @ a.T
    if case.rank_mask is not None:
        gates = torch.cat([case.rank_mask, case.rank_mask], dim=1)
        hidden = hidden * gates.view(len(gates), *(1,) * (x.ndim - 2), -1)
    return output + case.scale * (hidden @ b.T)


def fused(case: Case, x: Tensor, *, output: Tensor, differences: Triplet) -> Tensor:
    """The branch under test."""
    formed = form(case.base, differences, rank=case.rank, dtype=product_dtype(x))
    branch = Branch(RANK, case.rank_mask, case.scale)
    return add_branch(branch, x, output=output, formed=formed, differences=differences)


MASKS = {
    "all ranks": (RANK, None),
    "two ranks": (2, None),
    "a mask for all": (RANK, [4]),
    "a mask per sample": (RANK, [6, 1, 3]),
}


@pytest.mark.parametrize("scale", [1.0, 0.375])
@pytest.mark.parametrize("middle", [(), (5,), (SAMPLES, 2)], ids=["vectors", "tokens", "two axes"])
@pytest.mark.parametrize(("rank", "ranks"), MASKS.values(), ids=MASKS.keys())
def test_output_and_gradients_equal_the_plain_formula_in_float64(
    rank: int, ranks: list[int] | None, middle: tuple[int, ...], scale: float
) -> None:
    mask = None if ranks is None else rank_rows(ranks, max_rank=RANK).double()
    case = Case(triplet(1), rank, mask, scale)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, *middle, COLUMNS, generator=generator, dtype=torch.float64)
    output = torch.randn(SAMPLES, *middle, ROWS, generator=generator, dtype=torch.float64)
    incoming = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    found = []
    for add in (plain, fused):
        leaves = [each.clone().requires_grad_() for each in (x, output, *triplet(3, size=0.3))]
        q, p, values = leaves[2:]
        total = add(case, leaves[0], output=leaves[1], differences=(q, p, values))
        total.backward(incoming)
        found.append([total, *(leaf.grad for leaf in leaves)])
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", range(5), ids=["x", "output", "q", "p", "lambda"])
def test_each_gradient_is_there_without_the_others(needed: int) -> None:
    case = Case(triplet(1), 4, None, 0.5)
    x, output = torch.ones(2, COLUMNS).double(), torch.ones(2, ROWS).double()
    gradients = []
    for add in (plain, fused):
        leaves = [x.clone(), output.clone(), *triplet(3)]
        leaves[needed].requires_grad_()
        q, p, values = leaves[2:]
        add(case, leaves[0], output=leaves[1], differences=(q, p, values)).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == needed for index in range(5)]
        gradients.append(leaves[needed].grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_a_bf16_layer_are_float32_and_within_a_percent(autocast: bool) -> None:
    base = tuple(each.float() for each in triplet(1))
    mask = rank_rows([6, 1, 3], max_rank=RANK)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, 200, COLUMNS, generator=generator).bfloat16()
    output = torch.zeros(SAMPLES, 200, ROWS).bfloat16()
    incoming = torch.randn(output.shape, generator=generator)
    found = []
    for exact in (True, False):
        differences = [(each if exact else each.float()).requires_grad_() for each in triplet(3)]
        dtype = torch.float64 if exact else torch.float32
        case = Case(triplet(1) if exact else (base[0], base[1], base[2]), RANK, mask.to(dtype), 0.5)
        q, p, values = differences
        given = x.double() if exact else (x.float() if autocast else x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and not exact):
            add = plain if exact else fused
            total = add(case, given, output=output.double() if exact else output, differences=(q, p, values))
        assert exact or total.dtype == torch.bfloat16
        total.backward(incoming.to(total.dtype))
        found.append([each.grad for each in differences])
    for expected, own in zip(*found, strict=True):
        assert own.dtype == torch.float32
        assert (own.double() - expected).norm() / expected.norm() < 0.01

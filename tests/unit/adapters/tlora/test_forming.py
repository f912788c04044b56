"""Factors of many layers at once, and the gradients that they give, against the plain formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.tlora import forming, mask
from simpletuner.helpers.adapters.tlora import layer as layer_module
from simpletuner.helpers.adapters.tlora.delta import Triplet, difference_factors
from simpletuner.helpers.adapters.tlora.forming import FormedOfStep, form
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule

RANK = 6
SHAPES = [(10, 14), (10, 14), (8, 14), (10, 12), (10, 14)]
"""Outputs and inputs: the first and the last are of one shape, the others share an edge with them."""


@dataclass(eq=False)
class Layer:
    """A layer of these factors."""

    shape: tuple[int, ...]
    base: Triplet
    differences: Triplet


def layers(*, dtype: torch.dtype = torch.float64) -> list[Layer]:
    """A layer of each shape."""
    generator = torch.Generator().manual_seed(1)

    def triplet(outputs: int, inputs: int) -> Triplet:
        shapes = (RANK, inputs), (outputs, RANK), (RANK,)
        q, p, values = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        return q, p, values

    made = [Layer(shape, triplet(*shape), triplet(*shape)) for shape in SHAPES]
    for layer in made:
        for tensor in layer.differences:
            tensor.requires_grad_()
    return made


def of_step(
    step: FormedOfStep, layer: Layer, others: list[Layer], *, rank: int = RANK
) -> tuple[Tensor, Tensor]:
    """A and B, which are there for a small layer."""
    found = step.of(layer, others, rank=rank, dtype=torch.float64)
    assert found is not None
    return found


def loss_of(a: Tensor, b: Tensor) -> Tensor:
    """A number that every entry changes by another amount."""
    return (b @ a).sin().sum() + (a * torch.arange(a.numel()).view(a.shape)).sum() + b.square().sum()


@pytest.mark.parametrize("rank", [RANK, 2])
def test_factors_and_gradients_equal_the_plain_formula(rank: int) -> None:
    found = []
    for together in (True, False):
        step, network = FormedOfStep(), layers()
        total = torch.zeros(())
        for layer in network:
            if together:
                a, b = of_step(step, layer, network, rank=rank)
            else:
                a, b = difference_factors(layer.base, layer.differences, rank=rank)
            total = total + loss_of(a, b)
        total.backward()
        found.append([total, *(tensor.grad for layer in network for tensor in layer.differences)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_single_layer_has_the_same_factors() -> None:
    network = layers()
    step = FormedOfStep()
    for layer in network:
        formed = form(layer.base, layer.differences, rank=4, dtype=torch.float64)
        a, b = of_step(step, layer, network, rank=4)
        assert torch.equal(formed.a, a)
        assert torch.equal(formed.b, b)
        assert torch.equal(formed.q, (layer.base[0] + layer.differences[0])[:4])


def test_layers_outside_the_loss_have_no_gradient() -> None:
    network, step = layers(), FormedOfStep()
    for layer in network[1:3]:
        loss_of(*of_step(step, layer, network)).backward(retain_graph=True)
    has_gradient = [[tensor.grad is not None for tensor in layer.differences] for layer in network]
    assert has_gradient == [[False] * 3, [True] * 3, [True] * 3, [False] * 3, [False] * 3]


def test_outputs_without_a_gradient_give_none() -> None:
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, kept: Tensor, dropped: Tensor) -> Tensor:
            return kept + dropped.sum()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            return gradients[0], None

    network, step = layers(), FormedOfStep()
    kept = torch.ones((), dtype=torch.float64, requires_grad=True)
    for tensor in of_step(step, network[0], network):
        Drop.apply(kept, tensor).backward()  # type: ignore[no-untyped-call]
    assert kept.grad == 2
    assert all(each.grad is None for each in network[0].differences)


def test_gradients_of_two_backward_passes_add_up() -> None:
    network, step = layers(), FormedOfStep()
    gradients = []
    for _ in range(2):
        for layer in network:
            loss_of(*of_step(step, layer, network)).backward()
        gradients.append([tensor.grad.clone() for layer in network for tensor in layer.differences])  # type: ignore[union-attr]
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_no_more_is_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    network, step = layers(), FormedOfStep()
    monkeypatch.setattr(forming, "KEPT_BYTES", 2 * RANK * (24 + 24) * 8)  # of the first two layers
    first = of_step(step, network[0], network)
    of_step(step, network[1], network)
    assert of_step(step, network[0], network)[0] is first[0]
    of_step(step, network[2], network)
    assert of_step(step, network[0], network)[0] is not first[0]


def test_parts_are_the_same_from_the_last_layer_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    network, step = layers(), FormedOfStep()
    monkeypatch.setattr(forming, "KEPT_BYTES", 2 * RANK * (24 + 24) * 8)
    last = of_step(step, network[3], network)
    of_step(step, network[2], network)
    assert of_step(step, network[3], network)[0] is last[0]


def test_layer_outside_the_network_is_formed_alone() -> None:
    network, step = layers(), FormedOfStep()
    a, b = of_step(step, network[0], network[1:])
    formed = form(network[0].base, network[0].differences, rank=RANK, dtype=torch.float64)
    assert torch.equal(a, formed.a)
    assert torch.equal(b, formed.b)


def test_large_layer_is_formed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, step = layers(), FormedOfStep()
    monkeypatch.setattr(forming, "SMALL_BYTES", 2 * RANK * 23 * 8)
    assert step.of(network[0], network, rank=RANK, dtype=torch.float64) is None
    assert step.of(network[2], network, rank=RANK, dtype=torch.float64) is not None


def test_factors_follow_the_dtype_of_the_products() -> None:
    network, step = layers(dtype=torch.float32), FormedOfStep()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        found = step.of(network[0], network, rank=RANK, dtype=dtype)
        assert found is not None
        assert [tensor.dtype for tensor in found] == [dtype, dtype]
        loss_of(*found).backward()
        assert all(
            tensor.grad is not None and tensor.grad.dtype == torch.float32
            for tensor in network[0].differences
        )


def test_products_of_two_dtypes_keep_each_others_factors() -> None:
    network, step = layers(dtype=torch.float32), FormedOfStep()
    found = [
        step.of(network[0], network, rank=RANK, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert step.of(network[0], network, rank=RANK, dtype=torch.float32) is found[0]


def test_frozen_layers_are_not_formed_with_trained_ones() -> None:
    network, step = layers(), FormedOfStep()
    for tensor in network[1].differences:
        tensor.requires_grad_(False)
    assert of_step(step, network[0], network)[0].requires_grad
    assert not of_step(step, network[1], network)[0].requires_grad


class TestInALayer:
    """What a layer makes of it; `rank_mask` allows it, since nothing changes the parameters meanwhile."""

    schedule = RankSchedule(4)
    group = mask.new_group()

    def network(self) -> list[TLoraLayer]:
        """Attached layers with a delta."""
        torch.manual_seed(0)
        made = [TLoraLayer("layer", nn.Linear(8, 8), 1.0, 4, mask_group_id=self.group) for _ in range(3)]
        for layer in made:
            for tensor in layer.differences:
                nn.init.normal_(tensor, std=0.3)
            layer.apply_to()
        return made

    @pytest.mark.parametrize("timesteps", [[300], [300, 900]], ids=["one", "a timestep per sample"])
    def test_gradients_equal_those_of_layers_formed_alone(self, timesteps: list[int]) -> None:
        x, found = torch.randn(2, 5, 8), []
        for together in (True, False):
            network = self.network()
            with mask.rank_mask(self.schedule, timesteps, group=self.group):
                for each in [] if together else mask.mask_group(self.group).masks.values():
                    each.formed = None
                output = x
                for layer in network:
                    output = layer.org_module[0](output)
                output.square().sum().backward()
            found.append([output, *(tensor.grad for layer in network for tensor in layer.differences)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_parameters_changed_between_masks_count(self) -> None:
        layer, x = self.network()[0], torch.randn(2, 8)
        outputs = []
        for _ in range(2):
            with mask.rank_mask(self.schedule, [0], group=self.group):
                outputs.append(layer.org_module[0](x))
            with torch.no_grad():
                layer.delta_p.mul_(2)
        assert not torch.equal(*outputs)

    def test_pass_without_gradients_leaves_no_factors_for_one_with_them(self) -> None:
        layer, x = self.network()[0], torch.randn(2, 8)
        with mask.rank_mask(self.schedule, [0], group=self.group):
            with torch.no_grad():
                layer.org_module[0](x)
            layer.org_module[0](x).sum().backward()
        assert all(tensor.grad is not None for tensor in layer.differences)

    def test_no_layer_under_a_held_mask_is_formed_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layer_module, "form", None)
        network, x = self.network(), torch.randn(2, 8)
        with mask.rank_mask(self.schedule, [300], group=self.group):
            for layer in network:
                layer.org_module[0](x).sum().backward()
        assert all(tensor.grad is not None for layer in network for tensor in layer.differences)

    def test_only_linear_layers_of_the_same_rank_and_group_are_formed_together(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        group, elsewhere = mask.new_group(), mask.new_group()
        linear, other_rank, moved, vanilla = (
            TLoraLayer("layer", nn.Linear(8, 8), 1.0, rank, mask_group_id=group, tlora_init=init)
            for rank, init in ((4, "random"), (2, "random"), (4, "random"), (4, "vanilla"))
        )
        convolution = TLoraLayer("layer", nn.Conv2d(8, 8, 1), 1.0, 4, mask_group_id=group)
        moved.set_group(elsewhere)
        given: list[object] = []
        monkeypatch.setattr(FormedOfStep, "of", lambda _, layer, others, **__: given.extend(others))
        with mask.rank_mask(self.schedule, [0], group=group):
            linear(torch.randn(2, 8), torch.zeros(2, 8))
        assert given == [linear]
        assert not {other_rank, moved, vanilla, convolution} & set(given)

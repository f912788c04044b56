"""Blocks that are run again in the backward pass: which, at what memory, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from simpletuner.helpers.models import recomputing
from tests.integration.family_runs import DEV, FLUX, SDXL, FamilyModel
from tests.integration.tiny_runs import gradients


class Blocks(nn.Module):
    """Six blocks that recompute as a model of diffusers does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh()) for _ in range(6))
        self.recompute: Callable[..., Tensor] | None = None
        self.calls = [0] * 6
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._count(index))

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Tensor] | None = None
    ) -> None:
        self.recompute = gradient_checkpointing_func

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values) if self.recompute is None else self.recompute(block, values)
        return values

    def _count(self, index: int) -> None:
        self.calls[index] += 1


@pytest.mark.parametrize(
    ("interval", "calls"),
    [(2, [2, 1, 2, 1, 2, 1]), (3, [2, 1, 1, 2, 1, 1]), (4, [2, 1, 1, 1, 2, 1]), (7, [2, 1, 1, 1, 1, 1])],
)
def test_every_nth_block_runs_again_in_each_step(interval: int, calls: list[int]) -> None:
    model = Blocks()
    recomputing.recompute_blocks(model, interval=interval)
    for step in (1, 2):
        model(torch.ones(1, 64, requires_grad=True)).sum().backward()
        assert model.calls == [step * number for number in calls]


@pytest.mark.parametrize("model", [SDXL, FLUX, DEV], ids=["sdxl", "flux", "flux2-dev"])
def test_gradients_are_the_same_to_the_last_bit_and_more_is_kept(tmp_path: Path, model: FamilyModel) -> None:
    found: list[list[Tensor]] = []
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    for interval in (1, 2, 1000):
        sizes: list[int] = []
        run = model.run(tmp_path / str(interval))
        with run.trainer(gradient_checkpointing_interval=interval, train_batch_size=2) as trainer:
            for parameter in trainer.trainable.parameters():
                with torch.no_grad():
                    parameter.add_(0.01)  # a delta of zero has gradients of zero
            batch = next(iter(trainer.data.batches(start=0)))
            with saved_tensors_hooks(note, lambda tensor: tensor):
                trainer.train_step(batch.to(trainer.accelerator.device))
            found.append(gradients(trainer))
        kept.append(sum(sizes))
    assert sum(float(gradient.abs().sum()) for gradient in found[0]) > 0
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    assert kept[0] < kept[1] < kept[2], kept

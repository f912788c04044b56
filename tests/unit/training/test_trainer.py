"""How one optimiser step uses the gradients; tests/integration/test_trainer.py has whole runs."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.trainable import ParameterGroup
from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.contracts import Batch, MicroBatchOutput, Sample, Size, TextEmbeds
from simpletuner.helpers.data.phases import even
from simpletuner.helpers.training.trainer import Trainer

PIXELS = Size(64, 64)
SAMPLE = Sample("cats", "cat.png", "", PIXELS, PIXELS, (0, 0), PIXELS)
BATCH = Batch(torch.zeros(1, 4, 8, 8), TextEmbeds(torch.zeros(1, 2, 4)), (SAMPLE,), (0,))
GRADIENT = torch.tensor([3.0, 4.0])


def make(weight: nn.Parameter, *, end_step: int | None = None, **keys: object) -> Trainer:
    """A trainer of one weight by plain gradient descent at learning rate 1, halved after each step."""
    optimizer = torch.optim.SGD([weight], lr=1.0)
    parts = {
        "config": SimpleNamespace(training=SimpleNamespace(train_batch_size=1, **keys)),
        "accelerator": SimpleNamespace(
            num_processes=1,
            scaler=None,
            clip_grad_norm_=nn.utils.clip_grad_norm_,
            unscale_gradients=lambda: None,
            reduce=lambda tensor, reduction: tensor,
        ),
        "trainable": SimpleNamespace(
            parameters=lambda: [weight],
            groups=lambda: [ParameterGroup(name="weight", parameters=[weight], end_step=end_step)],
        ),
        "data": SimpleNamespace(calendar=even(1), batches_before=lambda samples: samples),
        "optimizer": optimizer,
        "lr_schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        "state": SimpleNamespace(progress=Progress()),
        "preemption": SimpleNamespace(requested=False),
        "requests": SimpleNamespace(wanted=frozenset),
        "text_encoding": SimpleNamespace(average_gradients=lambda _: None),
    }
    required = [each.name for each in fields(Trainer) if each.default is each.default_factory is MISSING]
    return Trainer(**dict.fromkeys(required) | parts)


def step(trainer: Trainer, weight: nn.Parameter) -> None:
    """One optimiser step on the loss whose gradient is GRADIENT."""
    loss: Tensor = (weight * GRADIENT).sum()
    loss.backward()
    trainer.metrics.add(BATCH, MicroBatchOutput(loss.detach(), loss.detach()[None], 1, (500,), None))
    trainer.apply_gradients()


@pytest.mark.parametrize(
    ("keys", "change"),
    [
        ({"grad_clip_method": "norm", "max_grad_norm": 0}, [3.0, 4.0]),
        ({"grad_clip_method": "norm", "max_grad_norm": 1.0}, [0.6, 0.8]),
        ({"grad_clip_method": "value", "max_grad_norm": 3.5}, [3.0, 3.5]),
    ],
    ids=["no bound", "norm", "value"],
)
def test_optimiser_steps_along_the_clipped_gradient_of_its_own_step_alone(
    keys: dict[str, object], change: list[float]
) -> None:
    weight = nn.Parameter(torch.zeros(2))
    trainer = make(weight, **keys)
    step(trainer, weight)
    torch.testing.assert_close(weight.detach(), -torch.tensor(change))
    step(trainer, weight)
    torch.testing.assert_close(weight.detach(), -1.5 * torch.tensor(change))


def test_parameters_stay_as_they_are_after_the_end_step_of_their_group() -> None:
    weight = nn.Parameter(torch.zeros(2))
    trainer = make(weight, end_step=1, grad_clip_method="norm", max_grad_norm=0)
    step(trainer, weight)
    step(trainer, weight)
    assert torch.equal(weight.detach(), -GRADIENT)

"""Learning-rate schedules against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.training import lr_schedules


def rates(*, max_steps: int, start: int = 0, **keys: object) -> list[float]:
    """The learning rate of every step from `start` on, as the optimiser is given it."""
    config = OptimizerConfig(learning_rate=1.0, **keys)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = lr_schedules.build_lr_schedule(optimizer, config, max_steps=max_steps, step=start)
    seen = []
    for _ in range(start, max_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("step", "warmup_steps", "share"), [(0, 0, 1.0), (0, 4, 0.25), (1, 4, 0.5), (3, 4, 1.0), (9, 4, 1.0)]
)
def test_warmup_rises_in_equal_parts_and_trains_from_the_first_step(
    step: int, warmup_steps: int, share: float
) -> None:
    assert lr_schedules.warmup_factor(step, warmup_steps=warmup_steps) == share


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (2, 0.0), (7, 0.5), (12, 1.0), (20, 1.0)])
def test_decay_begins_after_the_warmup_and_ends_with_the_run(step: int, share: float) -> None:
    assert lr_schedules.decay_progress(step, warmup_steps=2, max_steps=12) == share


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1.0), (0.25, (2 + math.sqrt(2)) / 4), (0.5, 0.5), (1.0, 0.0)]
)
def test_cosine_falls_along_one_half_wave(progress: float, share: float) -> None:
    assert lr_schedules.cosine(progress, end=0.0) == pytest.approx(share)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 2}, [1.0, 1.0, 1.0, 1.0]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"lr_scheduler": "linear", "lr_end": 0.0}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "linear", "lr_end": 0.0, "lr_warmup_steps": 2}, [0.5, 1.0, 1.0, 0.5]),
        ({"lr_scheduler": "linear", "lr_end": 0.5}, [1.0, 0.875, 0.75, 0.625]),
        ({"lr_scheduler": "cosine", "lr_end": 0.0}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"lr_scheduler": "polynomial", "lr_end": 0.0, "lr_power": 2.0}, [1.0, 0.5625, 0.25, 0.0625]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_end": 0.0, "lr_num_cycles": 2}, [1.0, 0.5, 1.0, 0.5]),
        ({"lr_scheduler": "sine", "lr_end": 0.0, "lr_num_cycles": 1}, [1.0, 0.5, 0.0, 0.5]),
    ],
)
def test_schedule_gives_the_rates_worked_out_by_hand(keys: dict[str, object], expected: list[float]) -> None:
    assert rates(max_steps=4, **{"lr_warmup_steps": 0, **keys}) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "name",
    ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"],
)
def test_schedule_resumed_at_a_step_goes_on_exactly(name: str) -> None:
    whole = rates(max_steps=10, lr_scheduler=name, lr_warmup_steps=3)
    assert rates(max_steps=10, start=4, lr_scheduler=name, lr_warmup_steps=3) == whole[4:]


def test_each_group_follows_the_schedule_from_a_rate_of_its_own() -> None:
    config = OptimizerConfig(learning_rate=0.5, lr_scheduler="linear", lr_end=0.0)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.5, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    lr_schedules.build_lr_schedule(optimizer, config, max_steps=10, step=4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.06])

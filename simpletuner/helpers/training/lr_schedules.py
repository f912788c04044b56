"""Learning-rate schedules as pure functions of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR

from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES, ScheduleArgument

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from simpletuner.helpers.configuration.schema.sections import OptimizerConfig

Curve = Callable[[float], float]


def warmup_factor(step: int, *, warmup_steps: int) -> float:
    """Fraction of the full rate at `step`: 1 / warmup_steps at step 0, 1 from the last warm-up step on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decay_progress(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Progress of the run after the warm-up at `step`, in [0, 1]."""
    return min(1.0, max(0, step - warmup_steps) / max(1, max_steps - warmup_steps))


def constant(_progress: float) -> float:
    """The full rate throughout."""
    return 1.0


def linear(progress: float, *, end: float) -> float:
    """From 1 to `end` in a straight line."""
    return 1.0 - (1.0 - end) * progress


def polynomial(progress: float, *, end: float, power: float) -> float:
    """From 1 to `end` along (1 - progress) ** power."""
    return end + (1.0 - end) * math.pow(1.0 - progress, power)


def cosine(progress: float, *, end: float) -> float:
    """From 1 to `end` along half a cosine wave."""
    return sine(progress, end=end, num_cycles=0.5)


def sine(progress: float, *, end: float, num_cycles: float) -> float:
    """Cosine waves between 1 and `end`; `num_cycles` counts whole waves."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress))


def cosine_with_restarts(progress: float, *, end: float, num_cycles: float) -> float:
    """`num_cycles` descents from 1 to `end`, each starting at the full rate again."""
    if progress >= 1.0:
        return end
    return cosine(num_cycles * progress % 1.0, end=end)


def curve_of(config: OptimizerConfig) -> Curve:
    """The configured schedule as a function from `decay_progress` to a fraction of the full rate."""
    record = LR_SCHEDULES[config.lr_scheduler]
    values: Mapping[ScheduleArgument, float] = {
        "end": config.lr_end / config.learning_rate,
        "power": config.lr_power,
        "num_cycles": config.lr_num_cycles,
    }
    return partial(record.load(), **{name: values[name] for name in record.arguments})


def build_lr_schedule(
    optimizer: Optimizer, config: OptimizerConfig, *, max_steps: int, step: int
) -> LambdaLR:
    """Set the learning rate of `optimizer` from optimiser step `step` on.

    Each parameter group has its own full rate, that with which the optimiser was built. The rate depends on
    the step alone: a resumed run needs no other state and may change the schedule.
    """
    curve = curve_of(config)
    warmup_steps = config.lr_warmup_steps if LR_SCHEDULES[config.lr_scheduler].has_warmup else 0

    def factor(step: int) -> float:
        progress = decay_progress(step, warmup_steps=warmup_steps, max_steps=max_steps)
        return warmup_factor(step, warmup_steps=warmup_steps) * curve(progress)

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, factor, last_epoch=step - 1)

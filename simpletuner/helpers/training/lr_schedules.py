"""Learning-rate schedules as pure functions of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from simpletuner.helpers.configuration.schema.sections import OptimizerConfig

Shape = Callable[[float], float]


def warmup_factor(step: int, *, warmup_steps: int) -> float:
    """Share of the full rate at `step`, rising in equal parts; 1 from the last warm-up step on.

    The first step (0) already trains, at 1 / warmup_steps of the rate.
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decay_progress(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """How much of the run after the warm-up is over at `step`, in [0, 1]."""
    return min(1.0, max(0, step - warmup_steps) / max(1, max_steps - warmup_steps))


def linear(progress: float, *, end: float) -> float:
    """From 1 to `end` in a straight line."""
    return 1.0 - (1.0 - end) * progress


def polynomial(progress: float, *, end: float, power: float) -> float:
    """From 1 to `end` along (1 - progress) ** power."""
    return end + (1.0 - end) * math.pow(1.0 - progress, power)


def cosine(progress: float, *, end: float, num_cycles: float) -> float:
    """From 1 to `end` along a cosine; `num_cycles` is in whole waves, so 0.5 is one descent."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress))


def cosine_with_restarts(progress: float, *, end: float, num_cycles: float) -> float:
    """`num_cycles` descents from 1 to `end`, each starting at the full rate again."""
    if progress >= 1.0:
        return end
    return cosine(num_cycles * progress % 1.0, end=end, num_cycles=0.5)


def shape_of(config: OptimizerConfig) -> Shape:
    """The share of the full rate as a function of `decay_progress`, for the configured schedule."""
    end = config.lr_end / config.learning_rate
    cycles, power = config.lr_num_cycles, config.lr_power
    shapes: dict[str, Shape] = {
        "constant": lambda _: 1.0,
        "constant_with_warmup": lambda _: 1.0,
        "linear": lambda progress: linear(progress, end=end),
        "polynomial": lambda progress: polynomial(progress, end=end, power=power),
        "cosine": lambda progress: cosine(progress, end=end, num_cycles=0.5),
        "cosine_with_restarts": lambda progress: cosine_with_restarts(progress, end=end, num_cycles=cycles),
        "sine": lambda progress: cosine(progress, end=end, num_cycles=cycles),
    }
    return shapes[config.lr_scheduler]


def build_lr_schedule(
    optimizer: Optimizer, config: OptimizerConfig, *, max_steps: int, step: int
) -> LambdaLR:
    """Drive the learning rate of `optimizer` from optimiser step `step` on.

    The rate depends on the step alone, so a resumed run needs no state but its step, and may change any
    setting of the schedule.
    """
    shape = shape_of(config)
    warmup_steps = 0 if config.lr_scheduler == "constant" else config.lr_warmup_steps

    def factor(step: int) -> float:
        progress = decay_progress(step, warmup_steps=warmup_steps, max_steps=max_steps)
        return warmup_factor(step, warmup_steps=warmup_steps) * shape(progress)

    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
    return LambdaLR(optimizer, factor, last_epoch=step - 1)

"""Learning-rate schedules: the values of `lr_scheduler`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpletuner.helpers.choices.registry import Choice, Registry

ScheduleArgument = Literal["end", "power", "num_cycles"]
"""lr_end as a fraction of learning_rate, lr_power, lr_num_cycles."""


@dataclass(frozen=True, kw_only=True)
class LrSchedule(Choice):
    """A schedule; `build` names a function from progress in [0, 1] to a fraction of the learning rate."""

    arguments: tuple[ScheduleArgument, ...] = ()
    """Keyword arguments of the function."""
    has_warmup: bool = True


_CURVES = "simpletuner.helpers.training.lr_schedules"

LR_SCHEDULES = Registry(
    LrSchedule(
        name="constant", summary="No warm-up, no decay.", build=f"{_CURVES}:constant", has_warmup=False
    ),
    LrSchedule(
        name="constant_with_warmup", summary="No decay after the warm-up.", build=f"{_CURVES}:constant"
    ),
    LrSchedule(
        name="linear", summary="A straight line to lr_end.", build=f"{_CURVES}:linear", arguments=("end",)
    ),
    LrSchedule(
        name="cosine", summary="Half a cosine wave to lr_end.", build=f"{_CURVES}:cosine", arguments=("end",)
    ),
    LrSchedule(
        name="cosine_with_restarts",
        summary="lr_num_cycles half waves to lr_end, each from the full learning rate.",
        build=f"{_CURVES}:cosine_with_restarts",
        arguments=("end", "num_cycles"),
    ),
    LrSchedule(
        name="polynomial",
        summary="(1 - progress) ** lr_power, to lr_end.",
        build=f"{_CURVES}:polynomial",
        arguments=("end", "power"),
    ),
    LrSchedule(
        name="sine",
        summary="lr_num_cycles whole cosine waves between the full learning rate and lr_end.",
        build=f"{_CURVES}:sine",
        arguments=("end", "num_cycles"),
    ),
)

"""The active rank of a timestep, and masks of active ranks.

Shapes: B batch, R rank.
Source: T-LoRA, arXiv:2507.05964, rank schedule.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from simpletuner.helpers.configuration.schema.lycoris import RankScale, ScheduleVariant

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig

# Files hold the position.
VARIANTS: tuple[ScheduleVariant, ...] = ("floor", "inclusive", "cosine", "linear")
ROUNDED: tuple[ScheduleVariant, ...] = ("cosine", "linear")
SCALES: tuple[RankScale, ...] = ("rank", "active")
SCHEDULE_KEY = "tlora_config"
"""Of a schedule in an adapter file's header."""
LARGEST = 2**20
"""Rank and number of timesteps; a table has an entry for each."""


def active_rank(
    timestep: int, *, max_rank: int, min_rank: int, alpha: float, num_timesteps: int, inclusive: bool = False
) -> int:
    """Number of active ranks at a timestep.

    All arithmetic is in Python floats: in float32 six of 70,070 values of a usual grid come out one off.

    Args:
        timestep: In [0, num_timesteps]; 0 is the clean image.
        max_rank: Rank at timestep 0.
        min_rank: Rank at the highest noise.
        alpha: Exponent; above 1 masks ranks at lower noise.
        num_timesteps: The timestep of pure noise.
        inclusive: Give max_rank a share of the timesteps; the paper's floor reaches it only at timestep 0.

    Source: T-LoRA, arXiv:2507.05964, rank schedule; `inclusive` is ours.
    """
    share = ((num_timesteps - timestep) / num_timesteps) ** alpha
    return min(max_rank, min_rank + int(share * (max_rank - min_rank + int(inclusive))))


def min_rank_of(value: float, rank: int) -> int:
    """Number of ranks that `tlora_min_rank` means in a layer of this rank.

    Args:
        value: A whole number is a rank; a number below 1 is a share of the rank, rounded down, at least one.
        rank: R of the layer.

    Raises:
        ValueError: The value is neither.
    """
    if isinstance(value, int) and value >= 1:
        return value
    if not 0 < value < 1:
        raise ValueError(
            f"min_rank {value!r} must be a whole number of at least 1, or a share of the rank, above 0 and "
            "below 1"
        )
    # The decimal as it is written: 0.29 of 100 is 29, where the product of floats is just below.
    return max(1, int(Fraction(str(value)) * rank))


def rounded_rank(timestep: int, *, max_rank: int, min_rank: int, num_timesteps: int, is_cosine: bool) -> int:
    """Number of active ranks at a timestep, rounded to the nearest, half to even; arguments as above.

    In float32 like its trainers: with Python's floats 17 of 64,064 values of a usual grid come out one off,
    among them the cosine's at half of the timesteps.

    Source: the T-LoRA networks of forks of lora-scripts, schedules `cosine` and `linear`.
    """
    one, half = np.float32(1), np.float32(0.5)
    share = one - np.float32(timestep) / np.float32(num_timesteps)
    if is_cosine:
        share = half - half * np.cos(share * np.float32(math.pi))
    return min_rank + int(np.rint(np.float32(max_rank - min_rank) * share))


@dataclass(frozen=True, slots=True)
class RankSchedule:
    """The active rank at every timestep.

    With scale active, and always in the variants cosine and linear, the active ranks are multiplied by
    max_rank over their number.

    Raises:
        ValueError: A value is outside its range.
    """

    max_rank: int
    min_rank: int = 1
    alpha: float = 1.0
    num_timesteps: int = 1000
    variant: ScheduleVariant = "floor"
    scale: RankScale = "rank"

    def __post_init__(self) -> None:
        if not all(isinstance(value, int) for value in (self.max_rank, self.min_rank, self.num_timesteps)):
            raise ValueError(
                f"max_rank {self.max_rank!r}, min_rank {self.min_rank!r} and num_timesteps "
                f"{self.num_timesteps!r} must be whole numbers"
            )
        if not 1 <= self.min_rank <= self.max_rank:
            raise ValueError(
                f"min_rank {self.min_rank} must be in 1..max_rank, and max_rank is {self.max_rank}"
            )
        if max(self.max_rank, self.num_timesteps) > LARGEST:
            raise ValueError(
                f"max_rank {self.max_rank!s:.20} and num_timesteps {self.num_timesteps!s:.20} must be at "
                f"most {LARGEST}"
            )
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha {self.alpha} must be a positive number")
        if self.variant in ROUNDED and self.alpha != 1:
            raise ValueError(f"alpha {self.alpha} has no meaning with schedule {self.variant}; omit it")
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps {self.num_timesteps} must be at least 1")
        if self.variant not in VARIANTS:
            raise ValueError(f"schedule {self.variant!r} is not one of {', '.join(VARIANTS)}")
        if self.scale not in SCALES:
            raise ValueError(f"scale {self.scale!r} is not one of {', '.join(SCALES)}")
        if self.scale == "active" and self.variant in ROUNDED:
            raise ValueError(f"scale active is part of schedule {self.variant} already; set it to rank")

    def rank_at(self, timestep: int) -> int:
        """Active rank at a timestep in [0, num_timesteps].

        Raises:
            ValueError: The timestep is outside the schedule.
        """
        if not 0 <= timestep <= self.num_timesteps:
            raise ValueError(f"timestep {timestep} is outside 0..{self.num_timesteps} of the rank schedule")
        if self.variant in ROUNDED:
            return rounded_rank(
                timestep,
                max_rank=self.max_rank,
                min_rank=self.min_rank,
                num_timesteps=self.num_timesteps,
                is_cosine=self.variant == "cosine",
            )
        return active_rank(
            timestep,
            max_rank=self.max_rank,
            min_rank=self.min_rank,
            alpha=self.alpha,
            num_timesteps=self.num_timesteps,
            inclusive=self.variant == "inclusive",
        )

    def gain_at(self, rank: int) -> float:
        """Factor on each of `rank` active ranks: max_rank / rank if the schedule scales them, else 1."""
        return self.max_rank / rank if self.scales_ranks else 1.0

    @property
    def scales_ranks(self) -> bool:
        """Whether active ranks count more, the fewer they are."""
        return self.scale == "active" or self.variant in ROUNDED

    def for_rank(self, rank: int) -> RankSchedule:
        """The schedule of a layer of another rank; the minimum is at most that rank."""
        return replace(self, max_rank=rank, min_rank=min(self.min_rank, rank))

    def mask(self, timesteps: Sequence[int]) -> Tensor:
        """[B, R] float32 on the CPU: the first `rank_at(t)` entries of a row are its gain, the others 0."""
        return self.rows([self.rank_at(timestep) for timestep in timesteps])

    def rows(self, ranks: Sequence[int]) -> Tensor:
        """[B, R] float32 on the CPU: the first `ranks[b]` entries of row b are their gain, the others 0."""
        rows = rank_rows(ranks, max_rank=self.max_rank)
        return rows * rows.new_tensor([self.gain_at(rank) for rank in ranks])[:, None]

    def config(self) -> dict[str, int | float | str]:
        """The schedule under the keys of `_tlora_config` and adapter files."""
        return {
            "max_rank": self.max_rank,
            "min_rank": self.min_rank,
            "alpha": self.alpha,
            "schedule": self.variant,
            "num_timesteps": self.num_timesteps,
            **({"scale": self.scale} if self.scale != "rank" else {}),
        }

    @classmethod
    def of_adapter(cls, config: LycorisConfig, *, num_timesteps: int) -> Self:
        """The schedule of a network of this lycoris json."""
        return cls(
            config.linear_dim,
            min_rank=min_rank_of(config.tlora_min_rank, config.linear_dim),
            alpha=config.tlora_alpha,
            num_timesteps=num_timesteps,
            variant=config.tlora_schedule,
            scale=config.tlora_scale,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, num_timesteps: int = 1000) -> Self:
        """Read the output of `config()`, or `{"max_rank": ..., "min_rank": ..., "alpha": ...}`.

        Raises:
            ValueError: `max_rank` is missing, a key is unknown, or a value is outside its range.
        """
        known = {"max_rank", "min_rank", "alpha", "schedule", "num_timesteps", "scale"}
        unknown = set(config) - known
        if unknown or "max_rank" not in config:
            found = ", ".join(sorted(config)) or "nothing"
            raise ValueError(
                f"a T-LoRA config needs max_rank and allows {', '.join(sorted(known))}; found {found}"
            )
        values = {key: config[key] for key in config if key != "schedule"} | {
            "variant": config.get("schedule", "floor")
        }
        return cls(**({"num_timesteps": num_timesteps} | values))  # type: ignore[arg-type]


class LayerRanks(NamedTuple):
    """Rank of a layer, and its own values in place of those of its network's schedule."""

    rank: int
    min_rank: int | None = None
    alpha: float | None = None
    is_scaled: bool = False
    """Whether the layer has `tlora_scale` active, for masks whose maker cannot know it."""

    @property
    def own(self) -> tuple[int | None, float | None]:
        """The layer's own min_rank and alpha."""
        return self.min_rank, self.alpha

    def schedule_in(self, network: RankSchedule) -> RankSchedule:
        """The layer's schedule in a network of this schedule; the minimum is at most the layer's rank."""
        own = network.for_rank(self.rank)
        if self.min_rank is not None:
            own = replace(own, min_rank=min(self.min_rank, self.rank))
        has_exponent = network.variant not in ROUNDED
        return replace(own, alpha=self.alpha) if self.alpha is not None and has_exponent else own


def weighted_schedules(layers: Sequence[LayerRanks], network: RankSchedule | None) -> dict[RankSchedule, int]:
    """Schedule -> number of layers that follow it, for means over the layers.

    A network whose layers all follow its own schedule has that alone, whatever their ranks.
    """
    if network is None:
        return {}
    if not any(any(layer.own) for layer in layers):
        return {network: max(1, len(layers))}
    return dict(Counter(layer.schedule_in(network) for layer in layers))


def rank_rows(ranks: Sequence[int], *, max_rank: int) -> Tensor:
    """[B, R] float32 whose row b starts with `ranks[b]` ones."""
    import torch  # here, because the forecast of a run needs the ranks without torch

    return (torch.arange(max_rank) < torch.tensor(ranks)[:, None]).float()

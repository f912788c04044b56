"""A T-LoRA layer's init and schedule, stored in a file as a small tensor that any tool keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.rank_schedule import (
    SCALES,
    VARIANTS,
    LayerRanks,
    RankSchedule,
    min_rank_of,
)
from simpletuner.helpers.configuration.schema.lycoris import SigType, TLoraInit
from simpletuner.helpers.errors import AdapterError

# Files hold the position of a value in these tuples.
INITS: tuple[TLoraInit, ...] = ("random", "weight", "vanilla")
SIG_TYPES: tuple[SigType, ...] = ("principal", "middle", "last")
LENGTHS = {1: 9, 2: 12}
"""Version -> number of values. Version 2 has scale, min_rank and alpha of the layer; 0 is no own value."""


@dataclass(frozen=True, slots=True)
class TLoraSpec:
    """A layer's initialisation and rank schedule."""

    init: TLoraInit
    sig_type: SigType
    schedule: RankSchedule | None
    """The network's. None in a file without one; the layer then accepts a mask of any max_rank."""
    min_rank: int | None = None
    """The layer's own, in place of the schedule's."""
    alpha: float | None = None
    """The layer's own, in place of the schedule's."""

    @property
    def own(self) -> tuple[int | None, float | None]:
        """The layer's own min_rank and alpha."""
        return self.min_rank, self.alpha

    def with_own(self, rank: int, *, min_rank: float | None, alpha: float | None) -> Self:
        """The spec with a layer's own values, as far as they differ from those of the schedule.

        Args:
            rank: R of the layer.
            min_rank: A rank or a share of R; None for the schedule's.
            alpha: Exponent; None for the schedule's.
        """
        own = None if min_rank is None else min(min_rank_of(min_rank, rank), rank)
        if self.schedule is not None:  # without one, the header of a file decides
            own = None if own == self.schedule.for_rank(rank).min_rank else own
            alpha = None if alpha == self.schedule.alpha else alpha
        return replace(self, min_rank=own, alpha=alpha)

    def ranks(self, rank: int) -> LayerRanks:
        """What a layer of this rank makes of its network's schedule."""
        is_scaled = self.schedule is not None and self.schedule.scale == "active"
        return LayerRanks(rank, self.min_rank, self.alpha, is_scaled)

    def tensor(self, rank: int) -> Tensor:
        """[9] float64: version, whether there is a schedule, its values, init and sig_type by number.

        [12] with a scale or values of the layer's own, which programs that know version 1 alone refuse.
        """
        schedule = self.schedule or RankSchedule(max_rank=rank)
        numbers = schedule.max_rank, schedule.min_rank, schedule.alpha, schedule.num_timesteps
        names = VARIANTS.index(schedule.variant), INITS.index(self.init), SIG_TYPES.index(self.sig_type)
        stated = float(self.schedule is not None)
        further = SCALES.index(schedule.scale), self.min_rank or 0, self.alpha or 0
        version, own = (2, further) if any(further) else (1, ())
        return torch.tensor([version, stated, *numbers, *names, *own], dtype=torch.float64)

    @classmethod
    def read(cls, stored: Tensor | None) -> Self:
        """The spec in a file; stock LyCORIS files have none and are weight/principal.

        Raises:
            AdapterError: A newer version wrote the tensor, or a value is outside its range.
        """
        if stored is None:
            return cls(init="weight", sig_type="principal", schedule=None)
        values = stored.double().flatten().tolist()
        if not values or LENGTHS.get(values[0]) != len(values):
            known = " or ".join(map(str, LENGTHS))
            raise AdapterError(f"tlora_schedule is {values}, not of version {known}. Update simpletuner.")
        if any(value < 0 or not value.is_integer() for value in values[:4] + values[5:11]):
            raise AdapterError(f"tlora_schedule is {values}: all values but alpha must be whole numbers.")
        scale, min_rank, alpha = values[9:] or (0.0, 0.0, 0.0)
        try:
            schedule = RankSchedule(
                max_rank=int(values[2]),
                min_rank=int(values[3]),
                alpha=values[4],
                num_timesteps=int(values[5]),
                variant=VARIANTS[int(values[6])],
                scale=SCALES[int(scale)],
            )
            own = int(min_rank) or None, alpha or None
            LayerRanks(rank=schedule.max_rank, min_rank=own[0], alpha=own[1]).schedule_in(schedule)
            return cls(
                init=INITS[int(values[7])],
                sig_type=SIG_TYPES[int(values[8])],
                schedule=schedule if values[1] else None,
                min_rank=own[0],
                alpha=own[1],
            )
        except (ValueError, IndexError, OverflowError) as error:
            raise AdapterError(f"tlora_schedule is {values}: {error}.") from error

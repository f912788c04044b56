"""A T-LoRA layer's init and schedule, stored in a file as a small tensor that any tool keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.rank_schedule import VARIANTS, RankSchedule
from simpletuner.helpers.configuration.schema.lycoris import SigType, TLoraInit
from simpletuner.helpers.errors import AdapterError

# Files hold the position of a value in these tuples.
INITS: tuple[TLoraInit, ...] = ("random", "weight", "vanilla")
SIG_TYPES: tuple[SigType, ...] = ("principal", "middle", "last")
VERSION = 1
LENGTH = 9


@dataclass(frozen=True, slots=True)
class TLoraSpec:
    """A layer's initialisation and rank schedule."""

    init: TLoraInit
    sig_type: SigType
    schedule: RankSchedule | None
    """None in a file without one; the layer then accepts a mask of any max_rank."""

    def tensor(self, rank: int) -> Tensor:
        """[9] float64: version, whether there is a schedule, its values, init and sig_type by number."""
        schedule = self.schedule or RankSchedule(max_rank=rank)
        numbers = schedule.max_rank, schedule.min_rank, schedule.alpha, schedule.num_timesteps
        names = VARIANTS.index(schedule.variant), INITS.index(self.init), SIG_TYPES.index(self.sig_type)
        stated = float(self.schedule is not None)
        return torch.tensor([VERSION, stated, *numbers, *names], dtype=torch.float64)

    @classmethod
    def read(cls, stored: Tensor | None) -> Self:
        """The spec in a file; stock LyCORIS files have none and are weight/principal.

        Raises:
            AdapterError: A newer version wrote the tensor, or a value is outside its range.
        """
        if stored is None:
            return cls(init="weight", sig_type="principal", schedule=None)
        values = stored.double().flatten().tolist()
        if len(values) != LENGTH or values[0] != VERSION:
            raise AdapterError(f"tlora_schedule is {values}, not of version {VERSION}. Update simpletuner.")
        if any(value < 0 or not value.is_integer() for value in values[:4] + values[5:]):
            raise AdapterError(f"tlora_schedule is {values}: all values but alpha must be whole numbers.")
        try:
            schedule = RankSchedule(
                max_rank=int(values[2]),
                min_rank=int(values[3]),
                alpha=values[4],
                num_timesteps=int(values[5]),
                variant=VARIANTS[int(values[6])],
            )
            return cls(
                init=INITS[int(values[7])],
                sig_type=SIG_TYPES[int(values[8])],
                schedule=schedule if values[1] else None,
            )
        except (ValueError, IndexError, OverflowError) as error:
            raise AdapterError(f"tlora_schedule is {values}: {error}.") from error

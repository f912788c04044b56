"""What a T-LoRA layer says about itself in a file: a small tensor that any tool keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.rank_schedule import VARIANTS, RankSchedule
from simpletuner.helpers.errors import AdapterError

SigType = Literal["principal", "middle", "last"]
TLoraInit = Literal["random", "weight", "vanilla"]
INITS: tuple[TLoraInit, ...] = get_args(TLoraInit)
SIG_TYPES: tuple[SigType, ...] = get_args(SigType)
VERSION = 1
LENGTH = 9


@dataclass(frozen=True, slots=True)
class TLoraSpec:
    """Where a layer's factors began and which schedule it follows."""

    init: TLoraInit
    sig_type: SigType
    schedule: RankSchedule | None
    """None when nothing states one; the layer then follows whatever mask is set."""

    def tensor(self, rank: int) -> Tensor:
        """[9] float64: version, whether a schedule is stated, its values, init and sig_type by number."""
        schedule = self.schedule or RankSchedule(max_rank=rank)
        numbers = schedule.max_rank, schedule.min_rank, schedule.alpha, schedule.num_timesteps
        names = VARIANTS.index(schedule.variant), INITS.index(self.init), SIG_TYPES.index(self.sig_type)
        stated = float(self.schedule is not None)
        return torch.tensor([VERSION, stated, *numbers, *names], dtype=torch.float64)

    @classmethod
    def read(cls, stored: Tensor | None) -> Self:
        """The description in a file; stock LyCORIS files have none and are weight/principal.

        Raises:
            AdapterError: The tensor was written by a newer version, or holds values outside their range.
        """
        if stored is None:
            return cls(init="weight", sig_type="principal", schedule=None)
        values = stored.double().flatten().tolist()
        if len(values) != LENGTH or values[0] != VERSION:
            raise AdapterError(f"tlora_schedule holds {values}: not version {VERSION}. Update simpletuner.")
        if any(value < 0 or not value.is_integer() for value in values[:4] + values[5:]):
            raise AdapterError(f"tlora_schedule holds {values}: all but alpha must be whole numbers.")
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
            raise AdapterError(f"tlora_schedule holds {values}: {error}.") from error

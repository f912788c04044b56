"""The public T-LoRA mask functions.

Set a mask before the forward, keep it until backward has finished, then clear it. Layers with a minimum, an
exponent or a scale of their own (`tlora_min_rank`, `tlora_alpha`, `tlora_scale`) keep it. LyCORIS's own
`get_timestep_mask()` returns the same mask, so stock LyCORIS layers follow it too. Importing this module
registers our T-LoRA layer with LyCORIS.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from simpletuner.helpers.adapters.tlora import layer as _tlora  # registers the layer
from simpletuner.helpers.adapters.tlora.mask import clear_mask, set_mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule

TLORA_AVAILABLE: bool = _tlora.TLoraLayer.name == "tlora"


def apply_tlora_timestep_mask(
    timesteps: torch.Tensor | Iterable[int],
    max_timestep: int,
    max_rank: int,
    min_rank: int = 1,
    alpha: float = 1.0,
) -> None:
    """Set the rank mask of a training batch, one row per sample, until `clear_tlora_mask`.

    Args:
        timesteps: B scheduler timesteps in [0, max_timestep].
        max_timestep: T, usually 1000.
        max_rank: The network's rank.
        min_rank: Rank at the highest noise.
        alpha: Exponent of the schedule.

    Raises:
        RuntimeError: A mask is still held: clear it after backward, then set the next one.
        ValueError: A value is outside its range.
    """
    device = timesteps.device if isinstance(timesteps, torch.Tensor) else None
    values = timesteps.flatten().tolist() if isinstance(timesteps, torch.Tensor) else timesteps
    schedule = RankSchedule(max_rank=max_rank, min_rank=min_rank, alpha=alpha, num_timesteps=max_timestep)
    set_mask(schedule, [int(value) for value in values], device=device, hold=True, keeps_scale=True)


def apply_tlora_inference_mask(
    timestep: torch.Tensor | float, max_timestep: int, max_rank: int, min_rank: int = 1, alpha: float = 1.0
) -> None:
    """Set the rank mask of one denoising step for the whole batch, until the next call or `clear_tlora_mask`.

    Raises:
        RuntimeError: A training mask is held for a backward that has not finished.
        ValueError: A value is outside its range.
    """
    device = timestep.device if isinstance(timestep, torch.Tensor) else None
    schedule = RankSchedule(max_rank=max_rank, min_rank=min_rank, alpha=alpha, num_timesteps=max_timestep)
    set_mask(schedule, [int(timestep)], device=device, keeps_scale=True)


def clear_tlora_mask() -> None:
    """Clear the mask of the two functions above."""
    clear_mask()

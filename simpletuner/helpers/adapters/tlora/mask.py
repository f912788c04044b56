"""The rank mask that is in force: set, hold, clear.

Plain module attributes and never a thread-local: on CUDA, autograd re-runs checkpointed blocks on threads of
its own, and the mask must be seen there. A mask belongs to a group (one per network that we build; 0 is what
the public functions and stock LyCORIS layers use), and is made once per step for every rank of the group.

Shapes: B batch, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from lycoris.modules.tlora import clear_timestep_mask, get_timestep_mask, set_timestep_mask
from torch import Tensor

from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule, rank_rows
from simpletuner.helpers.contracts import FIRST_OWN_MASK_GROUP
from simpletuner.helpers.errors import AdapterError

PUBLIC_GROUP = 0

_masks: dict[tuple[int, int], Tensor] = {}  # (group, R) -> [1, R] or [B, R]
_shared_ranks: dict[tuple[int, int], int] = {}  # (group, R) -> the rank that the whole batch shares
_schedules: dict[int, RankSchedule] = {}  # group -> what its mask was made from
_held: set[int] = set()  # groups whose mask a pending backward may still need
_layer_ranks: defaultdict[int, set[int]] = defaultdict(set)  # group -> ranks of its layers
_new_group = count(FIRST_OWN_MASK_GROUP)


def new_group() -> int:
    """A mask group that no other network has."""
    return next(_new_group)


def register_rank(group: int, rank: int) -> None:
    """Make every mask set from now on cover layers of this rank, in the group and in the public one."""
    _layer_ranks[group].add(rank)
    _layer_ranks[PUBLIC_GROUP].add(rank)


def set_mask(
    schedule: RankSchedule,
    timesteps: Sequence[int],
    *,
    group: int = PUBLIC_GROUP,
    device: torch.device | None = None,
    hold: bool = False,
) -> None:
    """Open the ranks of these timesteps for every layer of a group, until `clear_mask`.

    One timestep gives one mask for the whole batch; B timesteps give one per sample.

    Args:
        schedule: Its `max_rank` is the network's; layers of another rank follow it with their own maximum.
        timesteps: Host integers in [0, T].
        group: Mask group.
        device: Where the layers are; the mask is moved there once.
        hold: A backward will need this mask: setting another before it is cleared is then an error.

    Raises:
        RuntimeError: The group's mask is held for a backward that has not finished.
        ValueError: A timestep is outside the schedule, or there is none.
    """
    if group in _held:
        raise RuntimeError(
            "A rank mask is still held for a backward that has not finished. Under gradient checkpointing "
            "the forward runs again during backward, and would see the new mask. Clear the mask after "
            "backward, then set the next one."
        )
    if not timesteps:
        raise ValueError("a rank mask needs at least one timestep")
    clear_mask(group)
    for rank in {schedule.max_rank, *tuple(_layer_ranks[group])}:
        layer_schedule = schedule.for_rank(rank)
        ranks = [layer_schedule.rank_at(timestep) for timestep in timesteps]
        _masks[group, rank] = rank_rows(ranks, max_rank=rank).to(device)
        if len(set(ranks)) == 1:
            _shared_ranks[group, rank] = ranks[0]
    _schedules[group] = schedule
    set_timestep_mask(_masks[group, schedule.max_rank], group)
    if hold:
        _held.add(group)


def clear_mask(group: int = PUBLIC_GROUP) -> None:
    """Close the group's mask; nothing happens when none is set."""
    _held.discard(group)
    _schedules.pop(group, None)
    for key in [key for key in list(_masks) if key[0] == group]:  # other threads set their own meanwhile
        del _masks[key]
        _shared_ranks.pop(key, None)
    clear_timestep_mask(group)


@contextmanager
def rank_mask(
    schedule: RankSchedule, timesteps: Sequence[int], *, group: int, device: torch.device | None = None
) -> Iterator[None]:
    """Hold the mask of these timesteps for a forward and its backward, and clear it whatever happens."""
    set_mask(schedule, timesteps, group=group, device=device, hold=True)
    try:
        yield
    finally:
        clear_mask(group)


def current_mask(group: int, rank: int) -> Tensor | None:
    """The [1, R] or [B, R] mask for a layer: its own group's, else the public one, else None."""
    for candidate in (group, PUBLIC_GROUP):
        mask = _masks.get((candidate, rank))
        if mask is not None:
            return mask
    foreign: Tensor | None = get_timestep_mask(PUBLIC_GROUP)  # set through LyCORIS itself, for one rank
    return foreign


def check_fits(gate: Tensor, *, group: int, rank: int, nominal: int | None) -> None:
    """Refuse a mask that was made for a network of another rank, or is of another width than the layer.

    Args:
        gate: What `current_mask` gave.
        group: The layer's mask group.
        rank: The layer's own rank.
        nominal: The network's rank, None where nothing states it.

    Raises:
        AdapterError: The message names both ranks.
    """
    schedule = _schedules.get(group) or _schedules.get(PUBLIC_GROUP)
    if nominal is not None and schedule is not None and schedule.max_rank != nominal:
        raise AdapterError(
            f"The mask was made for max_rank {schedule.max_rank}, the network has {nominal}. "
            "Pass the network's own max_rank."
        )
    if gate.shape[1] != rank:
        raise AdapterError(f"The mask is {gate.shape[1]} ranks wide, a layer has {rank}. Pass its max_rank.")


def shared_rank(group: int, rank: int) -> int | None:
    """The open rank when the whole batch shares it; None when samples differ or no mask is set."""
    if (group, rank) in _masks:
        return _shared_ranks.get((group, rank))
    return _shared_ranks.get((PUBLIC_GROUP, rank))


def move_mask(group: int, rank: int, device: torch.device) -> Tensor:
    """The mask of a layer, moved to its device once for all layers of that rank."""
    mask = current_mask(group, rank)
    assert mask is not None, "only a mask that is set can be moved"
    moved = mask.to(device)
    owner = group if (group, rank) in _masks else PUBLIC_GROUP
    if (owner, rank) in _masks:  # one that was set through LyCORIS is not ours to keep
        _masks[owner, rank] = moved
    return moved

"""The current rank masks: set, hold, clear.

A mask group is what the layers of one network read; group 0 is what the public functions and stock LyCORIS
layers use, and what a layer reads while its own group has no mask. Groups are plain objects that their layers
hold, never thread-local: on CUDA, autograd re-runs checkpointed blocks on threads of its own.

Shapes: B batch, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lycoris.modules.tlora import clear_timestep_mask, get_timestep_mask, set_timestep_mask
from torch import Tensor, nn

from simpletuner.helpers.adapters.tlora.forming import FormedOfStep
from simpletuner.helpers.adapters.tlora.rank_schedule import LayerRanks, RankSchedule
from simpletuner.helpers.configuration.schema.lycoris import FIRST_OWN_MASK_GROUP

PUBLIC_GROUP = 0


@dataclass(eq=False)
class RankMask:
    """The mask that the layers of one rank and one schedule share during a step."""

    values: Tensor
    """[1, R] or [B, R]: the schedule's gain (1 for most) for an active rank, 0 for the others."""
    shared_rank: int | None
    """Active rank where all samples have the same, else None."""
    max_rank: int | None
    """Rank of the network that the mask was made for; None for a mask set through LyCORIS."""
    gain: float = 1.0
    """Value of the active ranks, where `shared_rank` is a number."""
    formed: FormedOfStep | None = None
    """Factors formed under this mask; None where the parameters may change meanwhile."""
    _doubled: Tensor | None = None

    def form_once(self) -> None:
        """Let layers keep their factors, since the parameters stay as they are under this mask."""
        self.formed = FormedOfStep()

    def on(self, device: torch.device) -> Tensor:
        """The values, moved to a device once for all layers that share them."""
        values = self.values
        if values.device != device:
            values = self.values = values.to(device)
        return values

    def of_both_halves(self, device: torch.device) -> Tensor:
        """The values for both halves of a T-LoRA layer's hidden ranks, made once: [1, 2R] or [B, 2R]."""
        if self._doubled is None or self._doubled.device != device:
            values = self.on(device)
            self._doubled = torch.cat([values, values], dim=1)
        return self._doubled


@dataclass(eq=False)
class MaskGroup:
    """The rank masks of the layers that share a group."""

    number: int
    """LyCORIS's number of the group."""
    masks: dict[LayerRanks, RankMask] = field(default_factory=dict)
    """Ranks of a layer -> its mask; empty when no mask is set."""
    layers: set[LayerRanks] = field(default_factory=set)
    is_held: bool = False
    """Whether a pending backward may still need the masks."""
    members: WeakKeyDictionary[nn.Module, LayerRanks] = field(default_factory=WeakKeyDictionary)
    """Layer -> its ranks, in the order of the network."""

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a layer reads the masks of the original's group
        return mask_group, (self.number,)

    def assign(self, masks: dict[LayerRanks, RankMask], *, is_held: bool) -> None:
        """Replace the masks."""
        self.masks, self.is_held = masks, is_held

    def current(self, layer: LayerRanks) -> RankMask | None:
        """The mask of a layer of these ranks: the group's own, else the public one, else None."""
        found = self.masks.get(layer)
        if found is None:
            found = _public.masks.get(layer)
        if found is None and (foreign := get_timestep_mask(PUBLIC_GROUP)) is not None:
            if layer.is_scaled:
                foreign = foreign * (foreign.shape[1] / foreign.sum(1, keepdim=True).clamp(min=1))
            return RankMask(foreign, shared_rank=None, max_rank=None)
        return found


_public = MaskGroup(PUBLIC_GROUP)
_groups = {PUBLIC_GROUP: _public}
_new_group = count(FIRST_OWN_MASK_GROUP)


def new_group() -> int:
    """A mask group that no other network has."""
    return next(_new_group)


def mask_group(number: int) -> MaskGroup:
    """The group of this number."""
    return _groups.setdefault(number, MaskGroup(number))


def join_group(number: int, *, layer: LayerRanks) -> MaskGroup:
    """The group of this number; every mask set from now on covers layers of these ranks, in group 0 too."""
    group = mask_group(number)
    group.layers.add(layer)
    _public.layers.add(layer)
    return group


def groups_with_mask() -> list[int]:
    """Numbers of the groups whose mask is set."""
    return [number for number, group in _groups.items() if group.masks]


def set_mask(
    schedule: RankSchedule,
    timesteps: Sequence[int],
    *,
    group: int = PUBLIC_GROUP,
    device: torch.device | None = None,
    hold: bool = False,
    keeps_scale: bool = False,
) -> None:
    """Set the rank masks of these timesteps for every layer of a group, until `clear_mask`.

    One timestep gives one mask for the whole batch; B timesteps give one per sample.

    Args:
        schedule: Its `max_rank` is the network's; layers of another rank follow it with their own maximum,
            and layers with values of their own keep them.
        timesteps: Host integers in [0, T].
        group: Mask group.
        device: Device of the layers; the masks are moved there once.
        hold: A backward needs these masks: setting others before they are cleared raises.
        keeps_scale: Layers with `tlora_scale` active have that scale, which the schedule does not state.

    Raises:
        RuntimeError: The group's mask is held for a backward that has not finished.
        ValueError: A timestep is outside the schedule, or there is none.
    """
    target = mask_group(group)
    if target.is_held:
        raise RuntimeError(
            f"The rank mask of group {group} is still held for a backward. Gradient checkpointing runs the "
            "forward again during backward and would read the new mask. Clear the mask after backward, then "
            "set the next one."
        )
    if not timesteps:
        raise ValueError("a rank mask needs at least one timestep")
    clear_mask(group)
    masks: dict[LayerRanks, RankMask] = {}
    made: dict[RankSchedule, RankMask] = {}
    network = LayerRanks(schedule.max_rank)
    for layer in {network, *tuple(target.layers)}:  # other threads add theirs meanwhile
        layer_schedule = layer.schedule_in(schedule)
        if keeps_scale and layer.is_scaled:
            layer_schedule = replace(layer_schedule, scale="active")
        if layer_schedule not in made:
            ranks = [layer_schedule.rank_at(timestep) for timestep in timesteps]
            made[layer_schedule] = RankMask(
                layer_schedule.rows(ranks).to(device),
                shared_rank=ranks[0] if len(set(ranks)) == 1 else None,
                max_rank=schedule.max_rank,
                gain=layer_schedule.gain_at(ranks[0]),
            )
        masks[layer] = made[layer_schedule]
    target.assign(masks, is_held=hold)
    set_timestep_mask(masks[network].values, group)


def clear_mask(group: int = PUBLIC_GROUP) -> None:
    """Clear the group's masks; nothing happens when none is set."""
    mask_group(group).assign({}, is_held=False)
    clear_timestep_mask(group)


@contextmanager
def rank_mask(
    schedule: RankSchedule, timesteps: Sequence[int], *, group: int, device: torch.device | None = None
) -> Iterator[None]:
    """Hold the masks of these timesteps for a forward and its backward, and clear them whatever happens.

    Meanwhile the adapter's parameters must not change, since layers form their factors once. Gradient
    checkpointing must be that of `use_reentrant=False`: the factors of many layers have one node of the
    graph, which a nested backward pass would run again for each block.
    """
    set_mask(schedule, timesteps, group=group, device=device, hold=True)
    for each in mask_group(group).masks.values():
        each.form_once()
    try:
        yield
    finally:
        clear_mask(group)


def current_mask(group: int, rank: int) -> Tensor | None:
    """The [1, R] or [B, R] mask that a layer of this group and rank reads, without values of its own.

    None when none is set.
    """
    found = mask_group(group).current(LayerRanks(rank))
    return None if found is None else found.values

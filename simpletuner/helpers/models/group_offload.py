"""Frozen weights on the host, copied to the device one group at a time: for a model larger than the device.

diffusers' group offloading is for inference: it moves the adapter with its layer, which loses a step of the
optimiser, and it frees weights that the backward pass still needs. Here a group is copied as new parameters,
which autograd keeps alive, and only frozen base weights move. With gradient checkpointing the backward pass
repeats a block's forward and so copies its weights again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from simpletuner.helpers.errors import ModelError

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import PrecisionConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weight:
    """A frozen weight of a layer, on the host."""

    layer: nn.Module
    name: str
    on_host: nn.Parameter

    def put(self, weight: nn.Parameter | None) -> None:
        """Set the layer's weight."""
        self.layer.register_parameter(self.name, weight)


class GroupOffload:
    """Keeps the group in use on the device and all others on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._present: tuple[Weight, ...] = ()

    def bring(self, group: tuple[Weight, ...]) -> None:
        """Copy the weights of a group to the device and free those of the last group."""
        if group is self._present:
            return
        for weight in self._present:
            weight.put(weight.on_host)
        for weight in group:
            copy = weight.on_host.detach().to(self._device, copy=True)
            weight.put(nn.Parameter(copy, requires_grad=False))
        self._present = group


def offload_groups(model: nn.Module, config: PrecisionConfig, *, device: torch.device) -> GroupOffload:
    """Keep a model's blocks on the host and move everything else, adapter included, to the device.

    Args:
        model: Model with its adapter, on the host.
        config: Type and size of a group.
        device: Device of the computation.

    Raises:
        ModelError: The model has no list of blocks.
    """
    offload = GroupOffload(device)
    groups = []
    for leaders, layers in _members(model, config):
        group = tuple(_frozen(layers))
        if group:
            groups.append(group)
            for leader in leaders:
                leader.register_forward_pre_hook(partial(_bring, offload, group))
    if not groups:
        raise ModelError(f"{type(model).__name__} has no list of blocks. Set enable_group_offload to false.")
    for weight in chain.from_iterable(groups):
        weight.put(None)
    model.to(device)
    for weight in chain.from_iterable(groups):
        weight.put(weight.on_host)
    logger.info("%s: weights stay on the host in %d groups.", type(model).__name__, len(groups))
    return offload


def _bring(offload: GroupOffload, group: tuple[Weight, ...], *_: object) -> None:
    offload.bring(group)


def _members(
    model: nn.Module, config: PrecisionConfig
) -> Iterator[tuple[Sequence[nn.Module], Iterable[nn.Module]]]:
    """Groups as (modules whose forward needs the group, layers of the group)."""
    if config.group_offload_type == "block_level":
        size = config.group_offload_blocks_per_group
        for blocks in (each for each in model.children() if isinstance(each, nn.ModuleList)):
            for first in range(0, len(blocks), size):
                group = list(blocks)[first : first + size]
                yield group, [layer for block in group for layer in block.modules()]
    else:
        lists = tuple(f"{path}." for path, each in model.named_modules() if isinstance(each, nn.ModuleList))
        for path, layer in model.named_modules():
            if path.startswith(lists):
                yield [layer], [layer]


def _frozen(layers: Iterable[nn.Module]) -> Iterator[Weight]:
    for layer in layers:
        for name, weight in layer.named_parameters(recurse=False):
            if not weight.requires_grad:
                yield Weight(layer, name, weight)

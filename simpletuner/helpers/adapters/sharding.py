"""Weights under FSDP2: each process has a shard of every factor of an adapter, or of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from simpletuner.helpers.adapters.attachment import adapters_of


def shard_adapters(denoiser: nn.Module) -> None:
    """Shard the adapters of a denoiser, each module as its own FSDP unit.

    As part of a block's unit, the factors would be cast to the block's compute dtype.
    """
    for module in list(adapters_of(denoiser)):
        fully_shard(module)


def shard_model(denoiser: Any) -> None:
    """Shard a whole denoiser of diffusers, each block as its own FSDP unit; weights keep their dtype.

    Gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    units = set(denoiser._no_split_modules)
    for module in reversed(list(denoiser.modules())):  # inner ones first
        if type(module).__name__ in units:
            fully_shard(module, mp_policy=policy)
    fully_shard(denoiser, mp_policy=policy)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors for a file; every process of a sharded run must call this.

    One sharded tensor after the other is gathered and moved to the host of the first process. The others
    return none of them.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            whole[name] = tensor
            continue
        complete = full_tensor(tensor)
        if get_rank() == 0:
            whole[name] = complete.cpu()
    return whole


def is_sharded(module: nn.Module) -> bool:
    """Whether the module is an FSDP unit, whose weights are whole in its own forward and backward alone."""
    return isinstance(module, FSDPModule)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this process has only a shard of the tensor."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded; then every process must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, sharing its memory; all of it unless it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


def join_part(part: Tensor, *, like: Tensor) -> Tensor:
    """The sharded tensor of which this process has that part; the part itself if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def distribute_like(value: Tensor, *, like: Tensor) -> Tensor:
    """Shard a whole tensor like another one, in its own dtype; unchanged if that one is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

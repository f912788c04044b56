"""Adapters under FSDP2: each process holds a part of every factor."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from simpletuner.helpers.adapters.attachment import adapters_of


def shard_adapters(denoiser: nn.Module) -> None:
    """Share the adapters of a denoiser out over the processes, each module a unit of its own.

    As part of a block's unit, the factors would be cast with the block to the dtype that it computes in.
    """
    for module in list(adapters_of(denoiser)):
        fully_shard(module)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, put together if it is shared out; every process must ask for it then."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def distribute_like(value: Tensor, *, like: Tensor) -> Tensor:
    """A whole tensor shared out as another one is; the same tensor if that is whole."""
    if not isinstance(like, DTensor):
        return value
    own = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(own, like.device_mesh, like.placements)

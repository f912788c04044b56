"""Adapters under FSDP2: each process has a shard of every factor."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from simpletuner.helpers.adapters.attachment import adapters_of


def shard_adapters(denoiser: nn.Module) -> None:
    """Shard the adapters of a denoiser, each module as its own FSDP unit.

    As part of a block's unit, the factors would be cast to the block's compute dtype.
    """
    for module in list(adapters_of(denoiser)):
        fully_shard(module)


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
    """Shard a whole tensor like another one; unchanged if that one is not sharded."""
    if not isinstance(like, DTensor):
        return value
    own = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(own, like.device_mesh, like.placements)

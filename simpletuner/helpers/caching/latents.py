"""The latents of images, encoded once and kept.

Shapes: B batch, C latent channels, H W image height and width, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar

import torch
from torch import Tensor

from simpletuner.helpers.caching.prefetch import prefetch
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import DataError

_NAME = "latents"
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class LatentRequest:
    """One image whose latents are wanted."""

    key: str
    """Depends on everything that the latents depend on."""
    name: str
    """The image's name in messages."""
    size: Size
    """Of the pixels that `load` gives."""
    load: Callable[[], Tensor]
    """Reads the image as [3, H, W] float32 in [-1, 1]."""


def read_latents(store: TensorStore, key: str) -> Tensor | None:
    """The [C, h, w] float32 latents of a key, None when they have to be made."""
    entry = store.get(key)
    return None if entry is None else entry.get(_NAME)


def fill_latents(
    store: TensorStore,
    requests: Sequence[LatentRequest],
    *,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode what the store lacks of the requests, in batches of one size; returns how many that were.

    `encode` maps [B, 3, H, W] in [-1, 1] to [B, C, h, w]. Of a shard (index, count) only every count-th
    request is handled, so that several processes share the work. `on_progress` is given (done, all).

    Raises:
        DataError: An image cannot be read, or its latents are not finite.
        StorageError: An entry cannot be written.
    """
    store.remove_stale()
    index, count = shard
    unique = list({request.key: request for request in requests}.values())
    mine = sorted(unique[index::count], key=lambda request: request.size)
    missing = [request for request in mine if read_latents(store, request.key) is None]
    done = len(mine) - len(missing)
    for batch, pixels in prefetch(_batches_of_one_size(missing, batch_size), _load):
        _store_batch(store, batch, encode(pixels))
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(mine))
    return len(missing)


def _batches_of_one_size(requests: Iterable[LatentRequest], batch_size: int) -> Iterator[list[LatentRequest]]:
    for _, group in groupby(requests, key=lambda request: request.size):
        yield from batched(group, batch_size)


def batched(items: Iterable[Item], length: int) -> Iterator[list[Item]]:
    """Lists of `length` items in order; the last may be shorter."""
    remaining = iter(items)
    while chunk := list(islice(remaining, length)):
        yield chunk


def _load(batch: list[LatentRequest]) -> tuple[list[LatentRequest], Tensor]:
    return batch, torch.stack([request.load() for request in batch])


def _store_batch(store: TensorStore, batch: list[LatentRequest], latents: Tensor) -> None:
    assert len(latents) == len(batch), f"{len(batch)} images gave {len(latents)} latents"
    whole = latents.detach().float().cpu()
    for request, one in zip(batch, whole, strict=True):
        if not bool(torch.isfinite(one).all()):
            raise DataError(
                f"{request.name}: its latents hold values that are not finite. "
                "The VAE overflows in this precision: load it in float32 or bfloat16, or use another VAE."
            )
        store.put(request.key, {_NAME: one}, spec={"image": request.name, "size": str(request.size)})

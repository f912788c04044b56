"""Encodes the entries that tensor stores lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from simpletuner.helpers.caching.prefetch import LoaderWatch, prefetch
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.errors import DataError

Input = TypeVar("Input")

VAE, TEXT_ENCODER = "VAE", "text encoder"
"""Encoders, in requests and messages."""


@dataclass(frozen=True, slots=True)
class CacheRequest(Generic[Input]):
    """An entry that a store must hold, and how to load its encoder's input."""

    store: TensorStore
    key: str
    name: str
    """In messages."""
    encoder: str
    """In messages: VAE or text encoder."""
    metadata: Mapping[str, str]
    """For people who look into the file."""
    load: Callable[[], Input | None]
    """None if the input turns out to be unusable; then no entry is made."""
    is_read_at_once: bool = False
    """Whether a present entry is read now, and made anew if it is damaged; else it is when it is used."""
    batch_group: str = ""
    """A batch holds neighbouring requests of one group."""
    file: Any = None
    """What `load` reads, for `expect`."""

    @property
    def entry(self) -> tuple[Path, str]:
        """Identity of the entry: the folder of its store, and its key."""
        return self.store.folder, self.key


def encode_missing(
    requests: Iterable[CacheRequest[Input]],
    encode: Callable[[list[Input]], Sequence[Mapping[str, Tensor]]],
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    watch: LoaderWatch | None = None,
    expect: Callable[[Iterable[Any]], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """Encode and store the requested entries that are missing; yields (encoded, missing) after each batch.

    `encode` maps the inputs of a batch to the tensors of its entries. A thread loads one batch ahead,
    and `expect` learns what will be loaded, in this order. Shard (i, n) takes every n-th entry from the i-th
    on, so that n processes divide the work.

    Raises:
        DataError: An input cannot be loaded, or an encoded value is not finite.
        StorageError: An entry cannot be written.
        LoaderTimeoutError: An input took longer than the watch allows.
        Preempted: A stop signal arrived while one was waited for.
    """
    watch = watch or LoaderWatch()
    unique = list({request.entry: request for request in requests}.values())
    index, num_shards = shard
    own = unique[index::num_shards]
    missing = _missing(own)
    if expect is not None:
        expect(request.file for request in missing if request.file is not None)
    try:
        yield from _encoded(missing, encode, batch_size=batch_size, watch=watch)
    finally:
        for store in {request.store for request in own}:
            store.flush()


def _encoded(
    missing: Sequence[CacheRequest[Input]],
    encode: Callable[[list[Input]], Sequence[Mapping[str, Tensor]]],
    *,
    batch_size: int,
    watch: LoaderWatch,
) -> Iterator[tuple[int, int]]:
    """Encode and put these requests; yields (encoded, missing) after each batch."""
    num_encoded = 0
    for batch, inputs in prefetch(_batches(missing, batch_size), partial(_load, watch), watch=watch):
        if inputs:
            put_encoded(batch, encode(inputs))
        num_encoded += len(batch)
        yield num_encoded, len(missing)


def put_encoded(requests: Sequence[CacheRequest[Input]], encoded: Sequence[Mapping[str, Tensor]]) -> None:
    """Store the tensors of requested entries.

    Raises:
        DataError: An encoded value is not finite.
        StorageError: An entry cannot be written.
    """
    for request, tensors in zip(requests, encoded, strict=True):
        _put(request, tensors)


def _missing(requests: Sequence[CacheRequest[Input]]) -> list[CacheRequest[Input]]:
    """The requests whose entries are not there, or are to be read at once and damaged."""
    keys: dict[TensorStore, list[str]] = {}
    for request in requests:
        keys.setdefault(request.store, []).append(request.key)
    held = {store: store.held(each) for store, each in keys.items()}
    return [
        request
        for request in requests
        if request.key not in held[request.store]
        or (request.is_read_at_once and request.key not in request.store)
    ]


def _batches(requests: Iterable[CacheRequest[Input]], size: int) -> Iterator[list[CacheRequest[Input]]]:
    for _, group in groupby(requests, key=lambda request: request.batch_group):
        while batch := list(islice(group, size)):
            yield batch


def _load(
    watch: LoaderWatch, batch: list[CacheRequest[Input]]
) -> tuple[list[CacheRequest[Input]], list[Input]]:
    """The requests of a batch whose inputs are usable, and these inputs."""
    usable, inputs = [], []
    for request in batch:
        watch.note(request.name)
        loaded = request.load()
        if loaded is not None:
            usable.append(request)
            inputs.append(loaded)
    return usable, inputs


def _put(request: CacheRequest[Input], tensors: Mapping[str, Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DataError(
            f"{request.name}: the {request.encoder}'s output holds values that are not finite. It overflows "
            f"in this precision: load the {request.encoder} in float32 or bfloat16, or use another one."
        )
    request.store.put(request.key, tensors, metadata=request.metadata)

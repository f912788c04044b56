"""Encodes the entries that tensor stores lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simpletuner.helpers.caching.memory import EntryStore
from simpletuner.helpers.caching.prefetch import LoaderWatch, prefetch
from simpletuner.helpers.caching.shards import halves
from simpletuner.helpers.errors import DataError

Input = TypeVar("Input")

VAE, TEXT_ENCODER, MASK = "VAE", "text encoder", "mask"
"""Encoders, in requests and messages."""


@dataclass(frozen=True, slots=True)
class CacheRequest(Generic[Input]):
    """An entry that a store must hold, and how to load its encoder's input."""

    store: EntryStore
    key: str
    name: str
    """In messages."""
    encoder: str
    """In messages: VAE, text encoder or mask."""
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


class CacheRequests(Sequence[CacheRequest[Input]]):
    """Requests whose keys are columns; a request is made when somebody asks for it.

    Args:
        stores: The stores that hold the entries.
        store_rows: [n], the position of each request's store.
        keys: [n, 2], the halves of each request's key.
        make: Makes a request by its position.
        read_at_once: Positions of the requests that `is_read_at_once`.
    """

    def __init__(
        self,
        stores: Sequence[EntryStore],
        store_rows: npt.NDArray[np.int64],
        keys: npt.NDArray[np.uint64],
        *,
        make: Callable[[int], CacheRequest[Input]],
        read_at_once: Sequence[int] = (),
    ) -> None:
        self.stores = stores
        self.store_rows = store_rows
        self.keys = keys
        self.read_at_once = read_at_once
        self._make = make

    @classmethod
    def of(cls, requests: Iterable[CacheRequest[Input]]) -> CacheRequests[Input]:
        """These requests."""
        if isinstance(requests, CacheRequests):
            return requests
        listed = list(requests)
        stores = list({request.store: None for request in listed})
        number = {store: row for row, store in enumerate(stores)}
        return cls(
            stores,
            np.array([number[request.store] for request in listed], np.int64),
            halves([request.key for request in listed]),
            make=listed.__getitem__,
            read_at_once=[row for row, request in enumerate(listed) if request.is_read_at_once],
        )

    def distinct(self) -> npt.NDArray[np.int64]:
        """The first request for each entry; ascending positions. Stores of one folder hold the same."""
        folders = [str(store.folder) for store in self.stores]
        _, of_store = np.unique(np.array(folders, dtype=object).astype(str), return_inverse=True)
        folder = of_store[self.store_rows] if folders else self.store_rows
        order = np.lexsort((self.keys[:, 1], self.keys[:, 0], folder))
        keys, folder = self.keys[order], folder[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (keys[1:] != keys[:-1]).any(axis=1) | (folder[1:] != folder[:-1])
        return np.sort(order[is_first])

    def missing(self, rows: npt.NDArray[np.int64]) -> list[int]:
        """The positions, among these, whose entries are not there, or are to be read at once and damaged."""
        is_missing = np.zeros(len(rows), bool)
        for number, store in enumerate(self.stores):
            own = self.store_rows[rows] == number
            if own.any():
                is_missing[own] = ~store.holds(self.keys[rows[own]])
        for row in set(self.read_at_once) & set(rows[~is_missing].tolist() if self.read_at_once else ()):
            request = self[row]
            is_missing[np.searchsorted(rows, row)] = request.key not in request.store
        return [int(row) for row in rows[is_missing]]

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> CacheRequest[Input]: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheRequest[Input]]: ...
    def __getitem__(self, index: int | slice) -> CacheRequest[Input] | list[CacheRequest[Input]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self._make(range(len(self))[index])


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
    columns = CacheRequests.of(requests)
    index, num_shards = shard
    own = columns.distinct()[index::num_shards]
    missing = [columns[row] for row in columns.missing(own)]
    if expect is not None:
        expect(request.file for request in missing if request.file is not None)
    try:
        yield from _encoded(missing, encode, batch_size=batch_size, watch=watch)
    finally:
        for store in columns.stores:
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

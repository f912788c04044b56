"""Shards: safetensors files that hold many entries of a tensor store. Their headers are the store's index.

Tensor NAME of entry KEY is named KEY.NAME. The tensors of an entry and, last, KEY.digest are one range of
bytes. The metadata, which stands first in the header, has the ranges as numbers, so that a thousand entries
are found without a thousand names.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.atomic import write_chunks
from simpletuner.helpers.io.safetensors_file import (
    METADATA,
    Part,
    header_bytes,
    places_of,
    read_leading_metadata,
)
from simpletuner.helpers.io.tensor_bytes import DTYPES, bytes_of, parts_of

_ABOUT, _INDEX = "about", "index"
_DIGEST = "digest"
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the bytes of its entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


Layout = tuple[Place, ...]
"""The tensors of an entry; entries of one size share theirs."""


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes of an entry in its shard."""

    start: int
    length: int
    layout: Layout


@dataclass(frozen=True, slots=True, eq=False)
class ShardIndex(Mapping[str, Range]):
    """Key -> range of each entry of a shard, as arrays."""

    key_halves: npt.NDArray[np.uint64]
    """[n, 2], the halves of each key."""
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    layout_ids: npt.NDArray[np.int32]
    layouts: tuple[Layout, ...]

    def range_at(self, row: int) -> Range:
        """The range of an entry by its row."""
        layout = self.layouts[int(self.layout_ids[row])]
        return Range(int(self.starts[row]), int(self.lengths[row]), layout)

    def without(self, keys: Collection[str]) -> ShardIndex:
        """The index without some entries."""
        kept = np.array([key not in keys for key in self], dtype=bool)
        return ShardIndex(
            self.key_halves[kept], self.starts[kept], self.lengths[kept], self.layout_ids[kept], self.layouts
        )

    def __getitem__(self, key: str) -> Range:
        (rows,) = np.nonzero((self.key_halves == halves([key])).all(axis=1))
        if not len(rows):
            raise KeyError(key)
        return self.range_at(int(rows[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(f"{first:016x}{second:016x}" for first, second in self.key_halves.tolist())

    def __len__(self) -> int:
        return len(self.key_halves)


NO_ENTRIES = ShardIndex(
    np.zeros((0, 2), np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), ()
)


def halves(keys: Collection[str]) -> npt.NDArray[np.uint64]:
    """[n, 2], the halves of each key of 32 hexadecimal digits."""
    data = bytes.fromhex("".join(keys))
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def digest_of(key: str, tensors: Mapping[str, Tensor]) -> bytes:
    """128 bits over a key and the names, dtypes, shapes and values of its tensors."""
    digest = xxhash.xxh3_128(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(bytes_of(tensor))
    return digest.digest()


def write_shard(folder: Path, entries: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, str]) -> Path:
    """Write entries as a new shard.

    Args:
        folder: Of the store.
        entries: Key -> the entry's contiguous tensors on the CPU.
        about: Key -> text for people who look into the header.

    Raises:
        StorageError: It cannot be written.
    """
    parts: list[Part] = []
    layouts: dict[Layout, int] = {}
    starts, lengths, layout_ids = [], [], []
    end = 0
    for key, tensors in entries.items():
        own = [*parts_of(tensors), (_DIGEST, "U8", (_DIGEST_BYTES,), digest_of(key, tensors))]
        parts += [(f"{key}.{name}", dtype, shape, data) for name, dtype, shape, data in own]
        first, places = end, []
        for name, dtype, shape, data in own:
            places.append(Place(name, dtype, shape, end - first))
            end += len(data)
        starts.append(first)
        lengths.append(end - first)
        layout_ids.append(layouts.setdefault(tuple(places), len(layouts)))
    index = {
        "keys": "".join(entries),
        "starts": starts,
        "lengths": lengths,
        "layout_ids": layout_ids,
        "layouts": [[astuple(place) for place in layout] for layout in layouts],
    }
    texts: dict[str, object] = {
        _ABOUT: json.dumps(dict(about)),
        _INDEX: json.dumps(index, separators=(",", ":")),
    }
    path = folder / f"shard-{uuid.uuid4().hex[:16]}.safetensors"
    write_chunks(path, [header_bytes({METADATA: texts} | places_of(parts)), *(data for *_, data in parts)])
    return path


def read_index(path: Path) -> ShardIndex:
    """The entries of a shard, by its header.

    Raises:
        DataError: It is no shard, or shorter than its header says.
    """
    metadata, data_start = read_leading_metadata(path, error=DataError)
    try:
        index = json.loads(metadata[_INDEX])
        found = ShardIndex(
            halves([index["keys"]]),
            np.array(index["starts"], dtype=np.int64) + data_start,
            np.array(index["lengths"], dtype=np.int64),
            np.array(index["layout_ids"], dtype=np.int32),
            tuple(
                tuple(Place(name, dtype, tuple(shape), int(start)) for name, dtype, shape, start in layout)
                for layout in index["layouts"]
            ),
        )
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not a readable shard: {error}.") from error
    sizes = {len(found.key_halves), len(found.starts), len(found.lengths), len(found.layout_ids)}
    if len(sizes) > 1 or (len(found) and found.layout_ids.max() >= len(found.layouts)):
        raise DataError(f"{path}: not a readable shard: its index is not complete.")
    if len(found) and int((found.starts + found.lengths).max()) > size:
        raise DataError(f"{path}: it is shorter than its header says.")
    if len(found) and min(found.starts.min() - data_start, found.lengths.min(), found.layout_ids.min()) < 0:
        raise DataError(f"{path}: not a readable shard: its index has a number below 0.")
    return found


def read_about(path: Path) -> dict[str, str]:
    """Key -> text for people, of the entries of a shard; {} if it cannot be read."""
    try:
        about = json.loads(read_leading_metadata(path, error=DataError)[0][_ABOUT])
    except (DataError, ValueError, KeyError):
        return {}
    return {str(key): str(text) for key, text in about.items()} if isinstance(about, dict) else {}


def parse_entry(key: str, data: bytearray, layout: Layout) -> dict[str, Tensor]:
    """The tensors of an entry, which share the memory of its bytes.

    Raises:
        ValueError: The digest differs, or the layout does not fit.
    """
    tensors = {place.name: _tensor_at(data, place) for place in layout}
    seal = tensors.pop(_DIGEST)
    if bytes(seal.tolist()) != digest_of(key, tensors):
        raise ValueError("its digest differs")
    return tensors


def _tensor_at(data: bytearray, place: Place) -> Tensor:
    dtype, count = DTYPES[place.dtype], math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=place.start).reshape(place.shape)

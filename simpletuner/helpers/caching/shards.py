"""Shards: safetensors files that hold many entries of a tensor store. Their headers are the store's index.

Tensor NAME of entry KEY is named KEY.NAME. The tensors of an entry and, last, KEY.digest are one range of
bytes: a digest of 16 bytes over key and tensors, and zeros up to a multiple of 8.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.atomic import write_chunks
from simpletuner.helpers.io.safetensors_file import header_bytes, read_metadata, read_whole_header

_DIGEST = "digest"
_DIGEST_BYTES = 16
_ALIGNMENT = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the bytes of its entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


_Part = tuple[int, int, str, str, tuple[int, ...]]
"""Start, end, name, dtype and shape of a tensor."""
Layout = tuple[Place, ...]
"""The tensors of an entry; entries of one size share theirs."""


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes of an entry in its shard."""

    start: int
    length: int
    layout: Layout


def digest_of(key: str, tensors: Mapping[str, Tensor]) -> bytes:
    """128 bits over a key and the names, dtypes, shapes and values of its tensors."""
    digest = xxhash.xxh3_128(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(_bytes_of(tensor))
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
    header: dict[str, object] = {"__metadata__": dict(about)}
    chunks: list[bytes | memoryview] = []
    end = 0
    for key, tensors in entries.items():
        # Large elements first, so that each tensor starts at a multiple of its element's size.
        named = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
        parts: list[tuple[str, str, list[int], bytes | memoryview]] = [
            (name, _NAMES[each.dtype], list(each.shape), _bytes_of(each)) for name, each in named
        ]
        used = end + sum(len(data) for *_, data in parts) + _DIGEST_BYTES
        seal = digest_of(key, tensors) + bytes(-used % _ALIGNMENT)
        for name, dtype, shape, data in (*parts, (_DIGEST, "U8", [len(seal)], seal)):
            header[f"{key}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            chunks.append(data)
            end += len(data)
    path = folder / f"shard-{uuid.uuid4().hex[:16]}.safetensors"
    write_chunks(path, [header_bytes(header), *chunks])
    return path


def read_index(path: Path) -> dict[str, Range]:
    """Key -> range of each entry of a shard, by its header.

    Raises:
        DataError: It is no shard, or shorter than its header says.
    """
    header, data_start = read_whole_header(path, error=DataError)
    entries: dict[str, list[_Part]] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                key, _, tensor = name.partition(".")
                start, end = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                entries.setdefault(key, []).append((start, end, tensor, entry["dtype"], shape))
        size = path.stat().st_size - data_start
        layouts: dict[Layout, Layout] = {}
        ranges = {key: _range_of(sorted(parts), data_start, layouts) for key, parts in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable shard: {error}.") from error
    if any(each.start - data_start + each.length > size for each in ranges.values()):
        raise DataError(f"{path}: it is shorter than its header says.")
    return ranges


def read_about(path: Path) -> dict[str, str]:
    """Key -> text for people, of the entries of a shard; {} if it cannot be read."""
    try:
        return read_metadata(path, error=DataError)
    except DataError:
        return {}


def parse_entry(key: str, data: bytearray, layout: Layout) -> dict[str, Tensor]:
    """The tensors of an entry, which share the memory of its bytes.

    Raises:
        ValueError: The digest differs, or the layout does not fit.
    """
    tensors = {place.name: _tensor_at(data, place) for place in layout}
    seal = tensors.pop(_DIGEST)
    if bytes(seal[:_DIGEST_BYTES].tolist()) != digest_of(key, tensors):
        raise ValueError("its digest differs")
    return tensors


def _range_of(parts: Sequence[_Part], data_start: int, layouts: dict[Layout, Layout]) -> Range:
    first, last = parts[0][0], max(end for _, end, *_ in parts)
    if first < 0 or parts[-1][2] != _DIGEST:
        raise ValueError("an entry has no digest")
    layout = tuple(Place(name, dtype, shape, start - first) for start, _, name, dtype, shape in parts)
    return Range(data_start + first, last - first, layouts.setdefault(layout, layout))


def _tensor_at(data: bytearray, place: Place) -> Tensor:
    dtype, count = _DTYPES[place.dtype], math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=place.start).reshape(place.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data

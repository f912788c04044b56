"""The file of an image index: columns as a safetensors file, read and written as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from simpletuner.helpers.data.columns import Rows, Texts
from simpletuner.helpers.io.atomic import write_chunks
from simpletuner.helpers.io.safetensors_file import METADATA, Part, header_bytes, places_of

_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
_SHAPES = {
    "images.names": ("U8", ()),
    "images.packed": ("I64", (4,)),
    "images.digests": ("U8", (16,)),
    "images.sizes": ("I32", (3,)),
    "texts.names": ("U8", ()),
    "texts.packed": ("I64", (4,)),
    "texts.bodies": ("U8", ()),
}
"""Column -> its type and the axes of a row."""
_LENGTH_BYTES = 8

Column = npt.NDArray[Any]


@dataclass(frozen=True)
class KnownFiles:
    """The names and packed signatures of files that an index knows."""

    names: Texts
    packed: npt.NDArray[np.int64]
    """[n, 4]."""

    def rows(self, names: Texts, packed: npt.NDArray[np.int64]) -> Rows:
        """The position of each of these files; -1 for one that is not known or has another signature."""
        if self.names.is_same(names):
            return np.where((self.packed == packed).all(axis=1), np.arange(len(names)), -1)
        rows = np.fromiter((self.by_name.get(name, -1) for name in names), np.int64, len(names))
        if not len(self.packed):
            return rows
        is_same = (rows >= 0) & (self.packed[rows] == packed).all(axis=1)
        return np.where(is_same, rows, -1)

    def row(self, name: str, packed: bytes) -> int:
        """The position of a file; -1 for one that is not known or has another signature."""
        row = self.by_name.get(name, -1)
        return row if row >= 0 and self.packed[row].tobytes() == packed else -1

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Name -> position."""
        return {name: row for row, name in enumerate(self.names)}


@dataclass(frozen=True)
class IndexContent:
    """What an index file holds."""

    images: KnownFiles
    """Contents without a file stand under an empty name."""
    digests: npt.NDArray[np.uint8]
    """[n, 16], of the bytes of each image."""
    sizes: npt.NDArray[np.int32]
    """[n, 3]: height, width, 1 if it is read anew; height 0 if the header cannot be used."""
    texts: KnownFiles
    """Caption files."""
    bodies: Texts
    """What each of them holds."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Digest -> the reason why the header cannot be used."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Digest -> the reason why the pixels cannot be used."""


def empty_content() -> IndexContent:
    """The content of no file."""
    columns = {name: np.zeros((0, *axes), _DTYPES[dtype]) for name, (dtype, axes) in _SHAPES.items()}
    return _content(columns, {"problems": {}, "damaged": {}})


def read_content(file: Path, *, version: str) -> IndexContent | None:
    """The content of an index file; None if another version wrote it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
        KeyError: It is damaged.
        TypeError: It is damaged.
    """
    data = memoryview(file.read_bytes())
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(data[_LENGTH_BYTES:start]))
    texts, body = header.pop(METADATA), data[start:]
    if texts["version"] != version:
        return None
    if texts["digest"] != _digest(texts["reasons"], [body]):
        raise ValueError("its digest differs")
    columns: dict[str, Column] = {}
    for name, (dtype, axes) in _SHAPES.items():
        first, end = header[name]["data_offsets"]
        columns[name] = np.frombuffer(body[first:end], dtype=_DTYPES[dtype]).reshape(-1, *axes)
    return _content(columns, json.loads(texts["reasons"]))


def write_content(file: Path, content: IndexContent, *, version: str) -> None:
    """Write an index file as a whole.

    Raises:
        StorageError: It cannot be written.
    """
    columns = _columns(content)
    parts: list[Part] = []
    # The widest elements first, so that each column starts at a multiple of its element's size.
    for name in sorted(columns, key=lambda name: (-columns[name].itemsize, name)):
        column = np.ascontiguousarray(columns[name])
        parts.append((name, _SHAPES[name][0], column.shape, column.reshape(-1).view(np.uint8).data))
    chunks = [data for *_, data in parts]
    reasons = json.dumps({"problems": dict(content.problems), "damaged": dict(content.damaged)})
    texts: dict[str, object] = {"version": version, "reasons": reasons, "digest": _digest(reasons, chunks)}
    write_chunks(file, [header_bytes({METADATA: texts} | places_of(parts)), *chunks], durable=False)


def is_same(one: IndexContent, other: IndexContent) -> bool:
    """Whether two contents are equal."""
    ours, theirs = _columns(one), _columns(other)
    return all(np.array_equal(ours[name], theirs[name]) for name in _SHAPES) and (
        one.problems == other.problems and one.damaged == other.damaged
    )


def _columns(content: IndexContent) -> dict[str, Column]:
    return {
        "images.names": content.images.names.data,
        "images.packed": content.images.packed,
        "images.digests": content.digests,
        "images.sizes": content.sizes,
        "texts.names": content.texts.names.data,
        "texts.packed": content.texts.packed,
        "texts.bodies": content.bodies.data,
    }


def _content(columns: Mapping[str, Column], reasons: Mapping[str, Mapping[str, str]]) -> IndexContent:
    content = IndexContent(
        images=KnownFiles(Texts(columns["images.names"]), columns["images.packed"]),
        digests=columns["images.digests"],
        sizes=columns["images.sizes"],
        texts=KnownFiles(Texts(columns["texts.names"]), columns["texts.packed"]),
        bodies=Texts(columns["texts.bodies"]),
        problems=reasons["problems"],
        damaged=reasons["damaged"],
    )
    images = {len(content.images.names), len(content.images.packed), len(content.digests), len(content.sizes)}
    texts = {len(content.texts.names), len(content.texts.packed), len(content.bodies)}
    if len(images) > 1 or len(texts) > 1:
        raise ValueError("its columns differ in length")
    return content


def _digest(reasons: str, chunks: Sequence[bytes | memoryview]) -> str:
    digest = xxhash.xxh3_128(reasons.encode())
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()

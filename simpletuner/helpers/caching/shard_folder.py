"""Finds entries in the shards of a store, by the shards' headers."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.caching.shards import NO_ENTRIES, Layout, Range, ShardIndex, halves, read_index
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.atomic import write_bytes
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"shard-[0-9a-f]{16}\.safetensors")
_OPEN_FILES = 32


@dataclass(frozen=True, slots=True)
class _Table:
    """The entries of all shards in the order of their keys, as arrays."""

    first: npt.NDArray[np.uint64]
    second: npt.NDArray[np.uint64]
    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]

    def find(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The position of each of these [n, 2] keys; -1 for one that is not there."""
        if not len(self.first):
            return np.full(len(keys), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.first, keys[:, 0]), len(self.first) - 1)
        found = (self.first[places] == keys[:, 0]) & (self.second[places] == keys[:, 1])
        return np.where(found, places, -1)


class Shards:
    """The shards of one folder. Shards that other processes add or remove are noticed on the next miss."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, ShardIndex] = {}
        self._names: list[str] = []
        self._table = _table_of([])
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def holds(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Whether each of these [n, 2] halves of keys has an entry, which is not read."""
        self._refresh()
        return self._table.find(keys) >= 0

    def read(self, key: str) -> tuple[bytearray, Layout] | None:
        """The bytes of an entry, unchecked; None if there is none.

        Raises:
            DataError: Its shard cannot be read.
        """
        found = self._find(key)
        if found is None and self._refresh():
            found = self._find(key)
        if found is None:
            return None
        name, where = found
        try:
            return self._bytes(name, where), where.layout
        except FileNotFoundError:  # another process packed it into another shard
            return self.read(key) if self._refresh() else None
        except OSError as error:
            raise DataError(
                f"{printable(str(self._folder / name))}: the cache cannot be read: {error.strerror}. "
                "Give read permission or choose another cache folder."
            ) from error

    def exclude(self, key: str) -> None:
        """Pass over the entry that `read` gives: here, and in later runs if the folder can be written to."""
        found = self._find(key)
        if found is None:
            return
        name = found[0]
        excluded = sorted({*excluded_keys(self._folder / name), key})
        self._shards.pop(name)
        try:
            write_bytes(exclusions_file(self._folder / name), json.dumps(excluded).encode())
        except StorageError as error:
            logger.warning("%s", error)
        self._load(name, excluded)
        self._merge()

    def close(self) -> None:
        """Close the shards that are open; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _find(self, key: str) -> tuple[str, Range] | None:
        place = int(self._table.find(halves([key]))[0])
        if place < 0:
            return None
        name = self._names[int(self._table.shards[place])]
        return name, self._shards[name].range_at(int(self._table.rows[place]))

    def _refresh(self) -> bool:
        """Look for shards that came or went; whether any did."""
        names = set(shard_names(self._folder))
        if names == self._shards.keys():
            return False
        for name in self._shards.keys() - names:
            del self._shards[name]
            if file := self._files.pop(name, None):
                file.close()
        for name in sorted(names - self._shards.keys()):
            self._load(name, excluded_keys(self._folder / name))
        self._merge()
        return True

    def _load(self, name: str, excluded: Collection[str]) -> None:
        """Read the header of a shard; one that cannot be read counts as empty."""
        try:
            index = read_index(self._folder / name)
        except DataError as error:
            logger.warning("%s Its entries count as missing.", error)
            index = NO_ENTRIES
        self._shards[name] = index.without(excluded) if excluded else index

    def _merge(self) -> None:
        self._names = list(self._shards)
        self._table = _table_of(list(self._shards.values()))

    def _bytes(self, name: str, where: Range) -> bytearray:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = FileIO(self._folder / name)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(name)
        data = bytearray(where.length)
        file.seek(where.start)
        num_read = 0
        while part := file.readinto(memoryview(data)[num_read:]):
            num_read += part
        return data


def shard_names(folder: Path) -> list[str]:
    """The names of the shards in a folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as listing:
        return [each.name for each in listing if _SHARD.fullmatch(each.name)]


def exclusions_file(shard: Path) -> Path:
    """The file that lists the damaged entries of a shard."""
    return shard.with_suffix(".damaged.json")


def excluded_keys(shard: Path) -> list[str]:
    """The keys of the entries of a shard that were found damaged."""
    try:
        return [str(key) for key in json.loads(exclusions_file(shard).read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is not readable: %s.", printable(str(exclusions_file(shard))), error)
        return []


def _table_of(shards: list[ShardIndex]) -> _Table:
    keys = np.concatenate([each.key_halves for each in shards] or [np.zeros((0, 2), np.uint64)])
    numbers = [np.full(len(each), index, np.int32) for index, each in enumerate(shards)]
    rows = [np.arange(len(each), dtype=np.int32) for each in shards]
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    return _Table(
        first=keys[order, 0],
        second=keys[order, 1],
        shards=np.concatenate(numbers or [np.zeros(0, np.int32)])[order],
        rows=np.concatenate(rows or [np.zeros(0, np.int32)])[order],
    )

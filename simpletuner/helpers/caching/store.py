"""Tensors on disk; an entry's key is a hash of everything that its tensors depend on."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from simpletuner.helpers.caching.shard_folder import Shards
from simpletuner.helpers.caching.shards import halves, parse_entry, write_shard
from simpletuner.helpers.caching.single_files import SingleFiles
from simpletuner.helpers.io.atomic import remove_leftovers
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.redaction import redacted

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{32}")
# A shard is written when its entries reach one of these.
MAX_SHARD_BYTES = 256 << 20
MAX_SHARD_ENTRIES = 1000
MAX_WAIT_S = 60.0
"""A killed process loses what it encoded since."""


def content_key(*parts: bytes | str) -> str:
    """A 128-bit key, in hexadecimal, that depends on every part and on where each of them ends."""
    return xxhash.xxh3_128_hexdigest(b"".join(map(key_part, parts)))


def key_part(part: bytes | str) -> bytes:
    """What a part adds to the bytes whose hash is a key."""
    data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
    return b"%d:%b" % (len(data), data)


def key_halves(texts: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """[n, 2], the halves of the keys of these bytes, each the joined parts of a key."""
    digests = b"".join(map(xxhash.xxh3_128_digest, texts))
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


class TensorStore:
    """A folder of entries, packed into shards that are written once.

    The headers of the shards say which entries there are; an entry's content is checked when it is read. One
    that does not match its digest counts as missing from then on. The files of one entry each that earlier
    versions wrote are read too. Several threads and processes may use a store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards, self._files = Shards(folder), SingleFiles(folder)
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._about: dict[str, str] = {}
        self._pending_bytes = 0
        self._pending_since_s = 0.0
        self._lock = RLock()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, on the CPU; None if there is no entry or it is damaged.

        Raises:
            DataError: The entry exists and cannot be read.
        """
        assert _KEY.fullmatch(key), f"{key!r} is no content key"
        with self._lock:
            if key in self._pending:
                return dict(self._pending[key])
            found = self._shards.read(key)
            while found is not None:
                try:
                    return parse_entry(key, *found)
                except (ValueError, KeyError, TypeError, RuntimeError) as error:
                    logger.warning("Cache entry %s in %s is damaged: %s.", key, self._shown, error)
                    self._shards.exclude(key)
                found = self._shards.read(key)
            return self._files.get(key)

    def __contains__(self, key: object) -> bool:
        """Whether there is an undamaged entry; reads it."""
        return isinstance(key, str) and self.get(key) is not None

    def holds(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Whether each of these [n, 2] halves of keys has an entry, which is not read, so it may be damaged.

        Removes the temporary files of writers on this machine that no longer run.
        """
        with self._lock:
            with suppress(OSError):  # a folder that cannot be written keeps them
                remove_leftovers(self.folder)
            found = self._shards.holds(keys)
            others = [*self._pending, *self._files.found()]
            if others:
                found |= np.isin(whole_keys(keys), whole_keys(halves(others)))
            return found

    def put(self, key: str, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
        """Add an entry; the metadata, which is redacted, is for people who look into the file.

        It is on disk after `flush`, which this calls for every full shard.

        Raises:
            StorageError: A shard cannot be written.
        """
        self.put_again(key, tensors, about=redacted(json.dumps(dict(metadata), ensure_ascii=False)))

    def put_again(self, key: str, tensors: Mapping[str, Tensor], *, about: str) -> None:
        """Add an entry that another shard holds with this text.

        Raises:
            StorageError: A shard cannot be written.
        """
        with self._lock:
            if not self._pending:
                self._pending_since_s = time.monotonic()
            self._pending[key] = {name: each.detach().contiguous().cpu() for name, each in tensors.items()}
            self._about[key] = about
            self._pending_bytes += sum(each.nbytes for each in self._pending[key].values())
            waited_s = time.monotonic() - self._pending_since_s
            if (
                self._pending_bytes >= MAX_SHARD_BYTES
                or len(self._pending) >= MAX_SHARD_ENTRIES
                or waited_s >= MAX_WAIT_S
            ):
                self.flush()

    def flush(self) -> None:
        """Write the entries that were put since the last shard.

        Raises:
            StorageError: The shard cannot be written.
        """
        with self._lock:
            if self._pending:
                write_shard(self.folder, self._pending, self._about)
                self._pending, self._about, self._pending_bytes = {}, {}, 0

    def close(self) -> None:
        """Close the files that are open; a later read opens them again."""
        with self._lock:
            self._shards.close()

    @property
    def _shown(self) -> str:
        return printable(str(self.folder))


def whole_keys(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bytes_]:
    """One value for each [n, 2] key."""
    return np.ascontiguousarray(keys).view("S16").reshape(-1)

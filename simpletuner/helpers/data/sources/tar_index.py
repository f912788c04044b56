"""The members of every archive of a place, kept in one file, so that a later start reads no archive."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import xxhash

from simpletuner.helpers.data.sources.base import FoundFile
from simpletuner.helpers.data.sources.tar_members import Members
from simpletuner.helpers.io.atomic import write_bytes
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)

_VERSION = "1"
# An archive that changed this shortly before it was read may change again within one tick of its times.
_RACY_NS = 2_000_000_000
_SAVED_EVERY_S = 30.0


class ArchiveIndex:
    """Members by the archive's name and signature; archives that are not looked up again are dropped."""

    def __init__(self, file: Path | None, *, is_read_only: bool = False) -> None:
        """With no file, or one that is only read, nothing is kept."""
        self._file, self._is_read_only = file, is_read_only
        self._known = {} if file is None else _read(file)
        self._current: dict[str, list[Any]] = {}
        self._saved_s = time.monotonic()

    def knows(self, archive: FoundFile) -> bool:
        """Whether the members of an archive are looked up without reading it."""
        known = self._known.get(archive.name)
        return known is not None and bool(known[0] == list(archive.signature))

    def members(self, archive: FoundFile) -> Members:
        """The members of a known archive."""
        self._current[archive.name] = self._known[archive.name]
        return Members(**self._known[archive.name][1])

    def add(self, archive: FoundFile, members: Members, *, started_ns: int) -> None:
        """Keep the members of an archive that was read from `started_ns` on, nanoseconds since 1970."""
        if started_ns - archive.source.changed_ns(archive) > _RACY_NS:
            self._current[archive.name] = [list(archive.signature), vars(members)]
        if time.monotonic() - self._saved_s > _SAVED_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file if something changed; a folder that cannot be written costs the next start time."""
        self._saved_s = time.monotonic()
        if self._file is None or self._is_read_only or self._current == self._known:
            return
        body = json.dumps({"version": _VERSION, "archives": self._current}, separators=(",", ":"))
        try:
            write_bytes(self._file, json.dumps([_digest(body), body]).encode(), durable=False)
        except StorageError as error:
            logger.warning("The index of tar archives is not kept, so the next start reads them: %s", error)


def _digest(body: str) -> str:
    return xxhash.xxh3_128_hexdigest(body.encode())


def _read(file: Path) -> dict[str, list[Any]]:
    """The stored entries; none if the file is missing or damaged."""
    try:
        digest, body = json.loads(file.read_bytes())
        if digest != _digest(body):
            raise ValueError("its digest differs")
        content = json.loads(body)
        if content["version"] == _VERSION:
            archives: dict[str, list[Any]] = content["archives"]
            return archives
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        shown = printable(str(file))
        logger.warning("The index of tar archives %s is damaged and will be rebuilt: %s.", shown, error)
    return {}

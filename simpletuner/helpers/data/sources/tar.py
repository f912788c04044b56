"""Tar archives, as webdataset has them: indexed once, then each image is read by its range."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from simpletuner.helpers.choices.image_files import image_suffixes
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.configuration.schema.tar_places import COMPRESSED_TAR, expanded, is_tar, split_place
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, FoundFile, ImageSource, RangedSource
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.data.sources.opening import open_source
from simpletuner.helpers.data.sources.read_ahead import ReadAhead
from simpletuner.helpers.data.sources.tar_index import ArchiveIndex
from simpletuner.helpers.data.sources.tar_members import Members, read_members
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import counted, file_name, printable

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class TarEntry:
    """Where the bytes of a member lie."""

    archive: FoundFile
    offset: int
    size: int


class TarArchives(ImageSource[TarEntry]):
    """The members of all archives in a place, as if they were unpacked into one folder.

    If two archives hold a member of one name, each archive is a folder of its own, with its name. A signature
    is (archive, offset, size, then the archive's own signature).
    """

    def __init__(self, storage: RangedSource[Any], pattern: str, *, identity: str) -> None:
        self._storage = storage
        names = expanded(pattern) if pattern else ()
        self._names = frozenset(name for name in names if not set("*?") & set(name))
        self._patterns = tuple(name.replace("[", "[[]") for name in names if name not in self._names)
        """Of names in the folder; without names and patterns all in it and its subfolders are taken."""
        self._identity = identity
        self._index: Path | None = None
        self._is_read_only = False
        self.reads_ahead = storage.reads_ahead
        self._ahead = ReadAhead(self._begun, num_bytes=lambda file: int(file.signature[2]))

    @property
    def place(self) -> str:
        """The place of the archives."""
        return self._storage.place

    def remember_in(self, folder: Path, *, is_read_only: bool = False) -> None:
        """Keep the members of each archive in a folder of the caches."""
        self._index = folder / f"archives_{file_name(self._identity)}.json"
        self._is_read_only = is_read_only

    def stat(self, name: str, entry: TarEntry) -> FoundFile:
        """The member with its signature."""
        archive = entry.archive
        return FoundFile(self, name, (archive.name, entry.offset, entry.size, *archive.signature))

    def read(self, file: FoundFile, *, limit: int) -> bytes:
        """The bytes of a member of at most `limit` bytes.

        Raises:
            DataError: The member is larger, or its archive changed or cannot be read.
        """
        archive, size = printable(str(file.signature[0])), int(file.signature[2])
        if size > limit:
            raise DataError(f"it is over {limit} bytes")
        try:
            data = (self._ahead.take(file) or self._begun(file)).result()
        except DataError as error:
            raise DataError(f"in {archive}: {error}") from error
        if len(data) != size:
            raise DataError(f"{archive} gives {len(data)} bytes of it instead of {size}")
        return data

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Begin to read members that will be asked for, in this order; each is a range of its archive."""
        self._ahead.expect(file for file in files if int(file.signature[2]) <= MAX_FILE_BYTES)

    def changed_ns(self, file: FoundFile) -> int:
        """When its archive last changed."""
        return self._storage.changed_ns(self._archive_of(file))

    def _begun(self, file: FoundFile) -> Future[bytes]:
        offset, size = map(int, file.signature[1:3])
        return self._storage.begin_range(self._archive_of(file), offset, size)

    def _archive_of(self, file: FoundFile) -> FoundFile:
        return FoundFile(self._storage, str(file.signature[0]), file.signature[3:])

    def _archives(self) -> tuple[list[FoundFile], list[tuple[str, str]]]:
        """The archives in the order of their names, and what lies beside them and is not read."""
        archives: list[FoundFile] = []
        beside: list[tuple[str, str]] = []
        problems: dict[str, str] = {}
        images = image_suffixes()
        for name, listed in self._storage.list():
            if not self._is_meant(name):
                reason = listed if isinstance(listed, str) else "it lies beside the archives, not in one"
                if self._takes_all and (reason == listed or os.path.splitext(name)[1].lower() in images):
                    beside.append((name, reason))
                continue
            found = listed if isinstance(listed, str) else self._storage.stat(name, listed)
            if isinstance(found, str):
                problems[name] = found
            elif COMPRESSED_TAR.search(name):
                problems[name] = "it is compressed, so its images cannot be read alone; decompress it"
            else:
                archives.append(found)
        names = {each.name for each in archives} | problems.keys()
        unmatched = [each for each in self._patterns if not any(fnmatchcase(name, each) for name in names)]
        problems |= dict.fromkeys([*sorted(self._names - names), *unmatched], "there is no such archive")
        self._refuse(problems)
        if not archives:
            raise DataError(f"{self.place}: no tar archive is there. Check instance_data_dir.")
        return sorted(archives, key=lambda each: each.name), beside

    @property
    def _takes_all(self) -> bool:
        return not (self._names or self._patterns)

    def _is_meant(self, name: str) -> bool:
        if self._takes_all:
            return is_tar(name) or COMPRESSED_TAR.search(name) is not None
        is_matched = any(fnmatchcase(name, pattern) for pattern in self._patterns)
        return name in self._names or (is_matched and "/" not in name)

    def _refuse(self, problems: Mapping[str, str]) -> None:
        if problems:
            found = [f"{printable(name)}: {reason}" for name, reason in list(problems.items())[:_SHOWN]]
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            number = counted(len(problems), "archive")
            raise DataError(f"{self.place}: {number} cannot be read: {'; '.join(found)}{more}.")

    def _members(self, archives: Sequence[FoundFile]) -> list[Members]:
        """The members of each archive; an archive that the index knows is not read."""
        index = ArchiveIndex(self._index, is_read_only=self._is_read_only)
        members: list[Members] = []
        problems: dict[str, str] = {}
        if number := sum(not index.knows(each) for each in archives):
            logger.info("Reading the headers of %s in %s.", counted(number, "tar archive"), self.place)
        for archive in archives:
            if index.knows(archive):
                members.append(index.members(archive))
                continue
            started_ns = time.time_ns()
            try:
                members.append(read_members(archive, self._storage))
            except DataError as error:
                problems[archive.name] = str(error)
            else:
                index.add(archive, members[-1], started_ns=started_ns)
        index.save()
        self._refuse(problems)
        return members

    def list(self) -> Iterator[tuple[str, TarEntry | str]]:
        """(name, entry or reason to skip it) of each member, and of each archive with a damaged end."""
        archives, beside = self._archives()
        members = self._members(archives)
        names = [name for each in members for name in each.names]
        is_repeated = len(set(names)) < len(names)
        yield from beside
        for archive, each in zip(archives, members, strict=True):
            folder = f"{archive.name}/" if is_repeated else ""
            fields = _further_images(each.names)
            if each.problem:
                yield archive.name, f"{each.problem}. {counted(len(each.names), 'file')} of it can be read"
            yield from ((folder + name, reason) for name, reason in each.skipped)
            for name, offset, size in zip(each.names, each.offsets, each.sizes, strict=True):
                yield folder + name, fields.get(name) or TarEntry(archive, offset, size)


def tar_archives(entry: ImagePlace) -> TarArchives:
    """The archives of an entry of the dataset json.

    Raises:
        DataError: Their place gives whole files only.
    """
    assert entry.instance_data_dir is not None, "the configuration asks for it"
    folder, pattern = split_place(entry.instance_data_dir)
    storage: ImageSource[Any]
    if "://" in folder:
        storage = open_source(entry.model_copy(update={"type": "local", "instance_data_dir": folder}))
    else:
        storage = LocalFolder(Path(folder), with_subfolders=not pattern)
    if not isinstance(storage, RangedSource):
        raise DataError(f"{entry.place}: tar archives cannot be read there. Copy them to a folder.")
    return TarArchives(storage, pattern, identity=entry.id)


def _further_images(names: Sequence[str]) -> dict[str, str]:
    """Name -> reason for images that are further fields of a sample, such as its mask in 0001.mask.png.

    Source: webdataset's convention: the name of a sample ends at the first dot, and its fields follow.
    """
    suffixes = image_suffixes()
    own: dict[str, str] = {}
    further: dict[str, str] = {}
    for name in names:
        if os.path.splitext(name)[1].lower() in suffixes:
            folder, _, base = name.rpartition("/")
            key, _, field = base.partition(".")
            if "." in field:
                further[name] = f"{folder}/{key}"
            else:
                own[f"{folder}/{key}"] = base
    return {
        name: f"it is another field of the sample of {printable(own[key])}, not an image of its own"
        for name, key in further.items()
        if key in own
    }

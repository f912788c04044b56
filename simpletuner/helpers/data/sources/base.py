"""What a source of images gives: its files by kind, each with a signature, and their bytes."""

from __future__ import annotations

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from simpletuner.helpers.choices.captions import caption_suffixes, caption_tables, shared_suffixes
from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes, unread_suffixes
from simpletuner.helpers.io.names import printable

MAX_FILE_BYTES = 256 << 20

Entry = TypeVar("Entry")
Texts = Callable[[str], tuple[str, ...] | None]
"""Name of an image -> its captions, of which there may be none; None if nothing is known of the image.

Raises:
    DataError: They cannot be used; the message names the row and the reason.
"""


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """An unusable image, or a caption file without an image, and the reason."""

    dataset_id: str
    path: str
    """Relative to the dataset's folder, printable."""
    reason: str


class ImageSource(ABC, Generic[Entry]):
    """A place that holds the files of an entry of the dataset json: a folder, storage, an archive or a table.

    It is only read, by several threads at a time. `Entry` is what the listing knows of a file.
    """

    holds_rows: ClassVar[bool] = False
    """Every entry of the listing is an image, whatever the suffix of its name."""
    reads_ahead: ClassVar[bool] = False
    """Whether it gains from `expect`: the first byte of a file is slow to come."""

    @property
    @abstractmethod
    def place(self) -> str:
        """The place in words for people, without secrets."""

    @abstractmethod
    def list(self) -> Iterable[tuple[str, Entry | str]]:
        """(name, its entry or the reason to skip it) of each file, in no particular order.

        Names are relative to the place, with forward slashes. Hidden files are left out.

        Raises:
            DataError: The place cannot be read; the message names it.
            SourceError: The same, for a place that is no folder on this machine.
        """

    @abstractmethod
    def stat(self, name: str, entry: Entry) -> FoundFile | str:
        """A listed file with its signature, or the reason to skip it; asked for images and captions alone."""

    @abstractmethod
    def read(self, file: FoundFile, *, limit: int) -> bytes:
        """The bytes of a file, of which there may be at most `limit`.

        Raises:
            DataError: The file is larger or cannot be read, and is left out; the message does not name it.
            SourceError: The place cannot be read any more, which ends the start; the message names the file.
        """

    def remember_in(self, folder: Path) -> None:
        """Keep what is learnt of the place in a folder of the caches; most sources have nothing to keep."""
        del folder

    def texts(self) -> Texts | None:
        """The captions that the place itself holds; None if it holds none."""
        return None

    def place_of(self, name: str) -> str:
        """Where a file lies, in words for people."""
        return f"{self.place}/{printable(name)}"

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Begin to read files that will be asked for, in this order."""
        del files

    def changed_ns(self, file: FoundFile) -> int:
        """When a file last changed, nanoseconds since 1970; 0 if the signature differs with the content."""
        del file
        return 0


class RangedSource(ImageSource[Entry]):
    """A source that also gives a part of a file, so that archives in it need not be read whole."""

    request_bytes = 1 << 20
    """How much to ask for at once when small parts are read one after another."""

    @abstractmethod
    def read_range(self, file: FoundFile, start: int, length: int) -> bytes:
        """The bytes of a file from `start` on, `length` of them or what there is of them.

        Raises:
            DataError: They cannot be read, or the file changed after the scan; the message does not name it.
        """

    @contextmanager
    def ranges(self, file: FoundFile) -> Iterator[Callable[[int, int], bytes]]:
        """`read_range` of one file, for many parts of it one after another."""
        yield partial(self.read_range, file)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a source, with a signature that changes when the file does."""

    source: ImageSource[Any]
    name: str
    """Relative to the source, with forward slashes; may hold bytes that are not UTF-8."""
    signature: tuple[int | str, ...]
    """What the source compares; JSON values."""

    @property
    def place(self) -> str:
        """Where it lies, in words for people."""
        return self.source.place_of(self.name)


@dataclass(frozen=True, slots=True)
class Scan:
    """The contents of a source, in the order of the names."""

    images: tuple[FoundFile, ...]
    captions: dict[str, tuple[FoundFile, ...]]
    """Name without suffix -> the caption files of that name (.txt, .TXT, .json)."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason)."""
    unread: tuple[tuple[str, str], ...] = ()
    """(name, reason) of the images in formats that are not read here."""
    conditioning: tuple[str, ...] = ()
    """Names of the masks and source images of other images, which are never trained on."""
    others: tuple[str, ...] = ()
    """Names of all other files."""
    texts: Texts | None = None
    """Captions that the source itself holds."""
    tables: tuple[FoundFile, ...] = ()
    """Files with the captions of a folder (metadata.jsonl)."""

    def orphans(self) -> list[FoundFile]:
        """Caption files without an image of their name, but for those that may be something else."""
        shared = shared_suffixes()
        return [file for file in self._ownerless() if _suffix(file.name) not in shared]

    def strays(self) -> list[FoundFile]:
        """Files without an image of their name that may be captions or something else (.json)."""
        shared = shared_suffixes()
        return [file for file in self._ownerless() if _suffix(file.name) in shared]

    def _ownerless(self) -> list[FoundFile]:
        names = (
            *(image.name for image in self.images),
            *(name for name, _ in (*self.skipped, *self.unread)),
        )
        owners = {owner for name in names for owner in (name, os.path.splitext(name)[0])}
        return [file for stem, files in self.captions.items() if stem not in owners for file in files]


def scan_source(source: ImageSource[Any]) -> Scan:
    """Find the images and text files of a source, in the order of their names.

    Raises:
        DataError: The source cannot be read.
    """
    images: list[FoundFile] = []
    captions: dict[str, list[FoundFile]] = {}
    tables: list[FoundFile] = []
    skipped: list[tuple[str, str]] = []
    names: dict[str, list[str]] = {"unread": [], "conditioning": [], "other": []}
    kinds = _Kinds(caption_suffixes(), caption_tables(), image_suffixes(), unread_suffixes())
    for name, entry in sorted(source.list(), key=_by_folder):
        kind = "image" if source.holds_rows else kinds.kind(name)
        found = entry
        if not isinstance(entry, str) and kind in ("image", "caption", "table"):
            found = source.stat(name, entry)
        if isinstance(found, str):
            skipped.append((name, found))
        elif kind == "image":
            images.append(found)
        elif kind == "table":
            tables.append(found)
        elif kind == "caption":
            captions.setdefault(os.path.splitext(name)[0], []).append(found)
        else:
            names[kind].append(name)
    return Scan(
        images=tuple(images),
        captions={stem: tuple(files) for stem, files in captions.items()},
        skipped=tuple(skipped),
        unread=tuple((name, kinds.unread[_suffix(name)]) for name in names["unread"]),
        conditioning=tuple(names["conditioning"]),
        others=tuple(names["other"]),
        texts=source.texts(),
        tables=tuple(tables),
    )


def expect(files: Iterable[FoundFile]) -> None:
    """Tell the sources of files that these will be read next, in this order."""
    by_source: dict[ImageSource[Any], list[FoundFile]] = {}
    for file in files:
        if file.source.reads_ahead:
            by_source.setdefault(file.source, []).append(file)
    for source, own in by_source.items():
        source.expect(own)


def read_bounded(file: FoundFile, *, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes.

    Raises:
        DataError: The file is larger or cannot be read; the message does not name it.
    """
    return file.source.read(file, limit=limit)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The suffixes of the files that a scan tells apart, in lower case."""

    captions: tuple[str, ...]
    tables: frozenset[str]
    images: frozenset[str]
    unread: dict[str, str]

    def kind(self, name: str) -> Literal["caption", "table", "image", "unread", "conditioning", "other"]:
        """What a file is by its name."""
        if name.lower().endswith(self.captions):
            return "caption"
        suffix = _suffix(name)
        if suffix not in self.images and suffix not in self.unread:
            return "table" if posixpath.basename(name).lower() in self.tables else "other"
        if conditioned_stem(name) is not None:
            return "conditioning"
        return "image" if suffix in self.images else "unread"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _by_folder(entry: tuple[str, object]) -> str:
    """Sorts like the list of path components: no name holds a NUL, which sorts before every character."""
    return entry[0].replace("/", "\0")

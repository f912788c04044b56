"""What a source of images gives: its files by kind, each with a signature, and their bytes."""

from __future__ import annotations

import os
import posixpath
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from operator import eq
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt
import xxhash

from simpletuner.helpers.choices.captions import caption_suffixes, caption_tables, shared_suffixes
from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes, unread_suffixes
from simpletuner.helpers.data.columns import Rows, Texts, is_everything
from simpletuner.helpers.io.names import printable

MAX_FILE_BYTES = 256 << 20
_FOUR_NUMBERS = struct.Struct("<4q")
_HASHED = b"\xff" * 16
"""Ends the packed signatures that are hashes: no file has both numbers below 0."""
_CODING = ("utf-8", "surrogatepass")

Entry = TypeVar("Entry")
CaptionsOf = Callable[[str], tuple[str, ...] | None]
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
    reads_ahead: bool = False
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

    def remember_in(self, folder: Path, *, is_read_only: bool = False) -> None:
        """Keep what is learnt of the place in a folder of the caches; most sources have nothing to keep.

        Args:
            folder: The folder.
            is_read_only: Use what is kept there, and write nothing.
        """
        del folder, is_read_only

    def captions(self) -> CaptionsOf | None:
        """The captions that the place itself holds; None if it holds none."""
        return None

    def place_of(self, name: str) -> str:
        """Where a file lies, in words for people."""
        return f"{self.place}/{printable(name)}"

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Begin to read files that will be asked for, in this order."""
        del files

    def shows_changes(self, file: FoundFile) -> bool:
        """Whether a later scan notices that a file is not the one of this scan any more."""
        del file
        return True

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

    def begin_range(self, file: FoundFile, start: int, length: int) -> Future[bytes]:
        """`read_range` begun, where it is slow; here it is read at once."""
        result: Future[bytes] = Future()
        result.set_result(self.read_range(file, start, length))
        return result

    @contextmanager
    def ranges(self, file: FoundFile) -> Iterator[Callable[[int, int], bytes]]:
        """`read_range` of one file, for many parts of it one after another."""
        yield partial(self.read_range, file)


class FoundFile(NamedTuple):
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


def packed_signature(signature: tuple[int | str, ...]) -> bytes:
    """32 bytes to compare a signature by: its four numbers, or a hash of any other one."""
    try:
        return _FOUR_NUMBERS.pack(*signature)
    except struct.error:
        return xxhash.xxh3_128_digest(repr(signature).encode(*_CODING)) + _HASHED


class Files(Sequence[FoundFile]):
    """Files of a source as columns."""

    def __init__(
        self,
        source: ImageSource[Any],
        names: Texts,
        packed: npt.NDArray[np.int64],
        others: Mapping[int, tuple[int | str, ...]],
    ) -> None:
        self.source = source
        self.names = names
        self.packed = packed
        """[n, 4], the signatures as `packed_signature` gives them."""
        self._others = others
        """Signatures that are not four numbers, by position."""

    def take(self, rows: Rows) -> Files:
        """The files at some positions."""
        if is_everything(rows, len(self)):
            return self
        others = {new: self._others[row] for new, row in enumerate(rows.tolist()) if row in self._others}
        return Files(self.source, self.names.take(rows), self.packed[rows], others if self._others else {})

    def stems(self) -> Iterator[str]:
        """The names without suffix."""
        return (name[:dot] if (dot := name.rfind(".")) > name.rfind("/") else name for name in self.names)

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, index: int) -> FoundFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[FoundFile]: ...
    def __getitem__(self, index: int | slice) -> FoundFile | list[FoundFile]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return self._file(row, self.names[row])

    def __iter__(self) -> Iterator[FoundFile]:
        return map(self._file, range(len(self)), self.names)

    def _file(self, row: int, name: str) -> FoundFile:
        numbers = tuple(self.packed[row].tolist())
        return FoundFile(self.source, name, self._others.get(row, numbers))


@dataclass(frozen=True)
class Scan:
    """The contents of a source, in the order of the names."""

    images: Files
    texts: Files
    """The caption files."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason)."""
    unread: tuple[tuple[str, str], ...] = ()
    """(name, reason) of the images in formats that are not read here."""
    conditioning: tuple[str, ...] = ()
    """Names of the masks and source images of other images, which are never trained on."""
    others: tuple[str, ...] = ()
    """Names of all other files."""
    listed: CaptionsOf | None = None
    """Captions that the source itself holds."""
    tables: tuple[FoundFile, ...] = ()
    """Files with the captions of a folder (metadata.jsonl)."""

    @cached_property
    def text_rows(self) -> dict[str, tuple[int, ...]]:
        """Name without suffix -> the positions of the caption files of that name (.txt, .TXT)."""
        rows: dict[str, tuple[int, ...]] = {}
        for row, stem in enumerate(self.texts.stems()):
            rows[stem] = (*rows.get(stem, ()), row)
        return rows

    @cached_property
    def captions(self) -> dict[str, tuple[FoundFile, ...]]:
        """Name without suffix -> the caption files of that name."""
        return {stem: tuple(self.texts[row] for row in rows) for stem, rows in self.text_rows.items()}

    @cached_property
    def pairs_in_order(self) -> bool:
        """Whether each image has the one caption file of its name without suffix, and there are no others."""
        return len(self.images) == len(self.texts) and all(map(eq, self.images.stems(), self.texts.stems()))

    def orphans(self) -> list[FoundFile]:
        """Caption files without an image of their name, but for those that may be something else."""
        shared = shared_suffixes()
        return [file for file in self._ownerless if _suffix(file.name) not in shared]

    def strays(self) -> list[FoundFile]:
        """Files without an image of their name that may be captions or something else (.json)."""
        shared = shared_suffixes()
        return [file for file in self._ownerless if _suffix(file.name) in shared]

    @cached_property
    def _ownerless(self) -> list[FoundFile]:
        if not len(self.texts) or self.pairs_in_order:
            return []
        lost = dict.fromkeys(self.text_rows)
        for name in chain(self.images.names, (name for name, _ in (*self.skipped, *self.unread))):
            lost.pop(name, None)
            lost.pop(os.path.splitext(name)[0], None)
        return [self.texts[row] for stem in lost for row in self.text_rows[stem]]


@dataclass(slots=True)
class _Listed:
    """Files in the order in which a source lists them."""

    names: list[str] = field(default_factory=list)
    packed: bytearray = field(default_factory=bytearray)
    others: dict[int, tuple[int | str, ...]] = field(default_factory=dict)

    def add(self, file: FoundFile) -> None:
        packed = packed_signature(file.signature)
        if packed.endswith(_HASHED):
            self.others[len(self.names)] = file.signature
        self.names.append(file.name)
        self.packed += packed

    def files(self, source: ImageSource[Any]) -> Files:
        """Them in the order of their names; they leave this list, which may be long."""
        names, packed, others = self.names, self.packed, self.others
        self.names, self.packed, self.others = [], bytearray(), {}
        keys = [by_folder(name) for name in names] if any("/" in name for name in names) else names
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        texts = Texts.of(map(names.__getitem__, order.tolist()))
        del names, keys
        moved = (
            {new: others[row] for new, row in enumerate(order.tolist()) if row in others} if others else {}
        )
        return Files(source, texts, np.frombuffer(packed, dtype="<i8").reshape(-1, 4)[order], moved)


def scan_source(source: ImageSource[Any]) -> Scan:
    """Find the images and text files of a source, in the order of their names.

    Raises:
        DataError: The source cannot be read.
    """
    found = {"image": _Listed(), "caption": _Listed()}
    tables: list[FoundFile] = []
    skipped: list[tuple[str, str]] = []
    names: dict[str, list[str]] = {"unread": [], "conditioning": [], "other": []}
    kinds = _Kinds(caption_suffixes(), caption_tables(), image_suffixes(), unread_suffixes())
    for name, entry in source.list():
        kind = "image" if source.holds_rows else kinds.kind(name)
        file = entry
        if not isinstance(entry, str) and (kind in found or kind == "table"):
            file = source.stat(name, entry)
        if isinstance(file, str) or "\0" in name:
            skipped.append((name, file if isinstance(file, str) else "its name holds a NUL"))
        elif kind in found:
            found[kind].add(file)
        elif kind == "table":
            tables.append(file)
        else:
            names[kind].append(name)
    for each in names.values():
        each.sort(key=by_folder)
    return Scan(
        images=found["image"].files(source),
        texts=found["caption"].files(source),
        skipped=tuple(sorted(skipped, key=lambda pair: by_folder(pair[0]))),
        unread=tuple((name, kinds.unread[_suffix(name)]) for name in names["unread"]),
        conditioning=tuple(names["conditioning"]),
        others=tuple(names["other"]),
        listed=source.captions(),
        tables=tuple(sorted(tables, key=lambda table: by_folder(table.name))),
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


Kind = Literal["caption", "table", "image", "unread", "conditioning", "other"]


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The suffixes of the files that a scan tells apart, in lower case."""

    captions: tuple[str, ...]
    tables: frozenset[str]
    images: frozenset[str]
    unread: dict[str, str]
    plain: dict[str, Kind] = field(init=False, default_factory=dict)
    """The kinds that a suffix alone tells, but for the names of masks and source images."""

    def __post_init__(self) -> None:
        for suffix in self.images:
            if not any(caption.endswith(suffix) for caption in self.captions):
                self.plain.update({suffix: "image", suffix.upper(): "image"})
        for suffix in self.captions:
            if suffix.rfind(".") == 0:
                self.plain.update({suffix: "caption", suffix.upper(): "caption"})

    def kind(self, name: str) -> Kind:
        """What a file is by its name."""
        kind = self.plain.get(name[name.rfind(".") :])
        if kind is None or "-" in name or "_controls/" in name:
            return self._looked_up(name)
        return kind

    def _looked_up(self, name: str) -> Kind:
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


def by_folder(name: str) -> str:
    """Sorts like the list of path components: no name holds a NUL, which sorts before every character."""
    return name.replace("/", "\0")

"""Finds the images and text files in a dataset's folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpletuner.helpers.choices.captions import caption_suffixes
from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes, unread_suffixes
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """An unusable image, or a caption file without an image, and the reason."""

    dataset_id: str
    path: str
    """Relative to the dataset's folder, printable."""
    reason: str


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A regular file in a dataset's folder, with a signature that changes when the file does."""

    folder: Path
    """The dataset's, symbolic links resolved."""
    name: str
    """Relative to the dataset's folder, with forward slashes; may hold bytes that are not UTF-8."""
    signature: tuple[int, int, int, int]
    """(bytes, modification time, status change time, inode); times in nanoseconds."""

    @property
    def path(self) -> Path:
        """The whole path; a property, because building it for each file would double the time of a scan."""
        return self.folder / self.name


@dataclass(frozen=True, slots=True)
class Scan:
    """The contents of a folder, in the order of the names."""

    images: tuple[FoundFile, ...]
    captions: dict[str, tuple[FoundFile, ...]]
    """Name without suffix -> the caption files of that name (.txt, .TXT)."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason)."""
    unread: tuple[tuple[str, str], ...] = ()
    """(name, reason) of the images in formats that are not read here."""
    conditioning: tuple[str, ...] = ()
    """Names of the masks and source images of other images, which are never trained on."""
    others: tuple[str, ...] = ()
    """Names of all other files."""

    def orphans(self) -> list[FoundFile]:
        """Caption files without an image of their name."""
        names = (
            *(image.name for image in self.images),
            *(name for name, _ in (*self.skipped, *self.unread)),
        )
        owners = {owner for name in names for owner in (name, os.path.splitext(name)[0])}
        return [file for stem, files in self.captions.items() if stem not in owners for file in files]


def scan_folder(folder: Path) -> Scan:
    """Find the images and text files in a folder and its subfolders, in the order of their names.

    Hidden files are ignored. Symbolic links to folders or out of the dataset's folder, unreadable subfolders,
    and images and text files that are not regular files are skipped with a reason.

    Raises:
        DataError: The dataset's folder cannot be read.
    """
    root = folder.resolve()
    images: list[FoundFile] = []
    captions: dict[str, list[FoundFile]] = {}
    skipped: list[tuple[str, str]] = []
    names: dict[str, list[str]] = {"unread": [], "conditioning": [], "other": []}
    kinds = _Kinds(caption_suffixes(), image_suffixes(), unread_suffixes())
    for name, entry in sorted(_walk(root), key=_by_folder):
        kind = kinds.kind(name)
        found: FoundFile | os.DirEntry[str] | str = entry
        if isinstance(entry, os.DirEntry) and kind in ("image", "caption"):
            found = _file_or_reason(root, entry, name)
        if isinstance(found, str):
            skipped.append((name, found))
        elif isinstance(found, FoundFile) and kind == "image":
            images.append(found)
        elif isinstance(found, FoundFile):
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
    )


def read_bounded(file: FoundFile, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        DataError: The file is larger, not regular or cannot be read; the message does not name it.
    """
    try:
        with open(file.path, "rb", opener=_open_at_once) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise DataError("it is not a regular file")
            data = opened.read(limit + 1)
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise DataError(f"it is over {limit} bytes")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a pipe may have replaced it since the scan."""
    try:
        from os import O_NONBLOCK
    except ImportError:  # Windows, which has no such pipes
        return os.open(path, flags)
    return os.open(path, flags | O_NONBLOCK)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The suffixes of the files that a scan tells apart, in lower case."""

    captions: tuple[str, ...]
    images: frozenset[str]
    unread: dict[str, str]

    def kind(self, name: str) -> Literal["caption", "image", "unread", "conditioning", "other"]:
        """What a file is by its name."""
        if name.lower().endswith(self.captions):
            return "caption"
        suffix = _suffix(name)
        if suffix not in self.images and suffix not in self.unread:
            return "other"
        if conditioned_stem(name) is not None:
            return "conditioning"
        return "image" if suffix in self.images else "unread"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
    """(name, entry or reason to skip it), in no particular order."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as listing:
                entries = list(listing)
        except OSError as error:
            if not prefix:
                raise DataError(
                    f"{printable(str(root))}: the dataset's folder cannot be read: {error.strerror}. "
                    "Check instance_data_dir."
                ) from error
            yield prefix.rstrip("/"), f"the folder cannot be read: {error.strerror}"
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(name + "/")
            elif entry.is_symlink() and _is_folder(entry):
                yield name, "it is a link to a folder"
            else:
                yield name, entry


def _by_folder(entry: tuple[str, object]) -> str:
    """Sorts like the list of path components: no name holds a NUL, which sorts before every character."""
    return entry[0].replace("/", "\0")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False


def _file_or_reason(root: Path, entry: os.DirEntry[str], name: str) -> FoundFile | str:
    try:
        if entry.is_symlink() and not Path(entry.path).resolve(strict=True).is_relative_to(root):
            return "it is a link that leaves the dataset's folder"
        status = entry.stat()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return "it is a link to nothing" if entry.is_symlink() else "its status cannot be read"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    signature = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return FoundFile(folder=root, name=name, signature=signature)

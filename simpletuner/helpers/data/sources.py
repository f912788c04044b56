"""Finds the images and text files in a dataset's folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.helpers.choices.captions import caption_suffixes
from simpletuner.helpers.configuration.schema.datasets import IMAGE_SUFFIXES
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """An unusable image and the reason."""

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
    suffixes = caption_suffixes()
    for name, found in sorted(_walk(root), key=_by_folder):
        if isinstance(found, str):
            skipped.append((name, found))
        elif name.lower().endswith(suffixes):
            captions.setdefault(os.path.splitext(name)[0], []).append(found)
        else:
            images.append(found)
    texts = {stem: tuple(files) for stem, files in captions.items()}
    return Scan(images=tuple(images), captions=texts, skipped=tuple(skipped))


def read_bounded(file: FoundFile, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        DataError: The file is larger, not regular or cannot be read; the message does not name it.
    """
    try:
        # Non-blocking: a pipe may have replaced the file since the scan.
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DataError("it is not a regular file")
            data = opened.read(limit + 1)
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise DataError(f"it is over {limit} bytes")
    return data


def _walk(root: Path) -> Iterator[tuple[str, FoundFile | str]]:
    """(name, file or reason to skip it), in no particular order."""
    suffixes = (*sorted(IMAGE_SUFFIXES), *caption_suffixes())
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
            elif name.lower().endswith(suffixes):
                yield name, _file_or_reason(root, entry, name)
            elif entry.is_symlink() and _is_folder(entry):
                yield name, "it is a link to a folder"


def _by_folder(entry: tuple[str, FoundFile | str]) -> str:
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

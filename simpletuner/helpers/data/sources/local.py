"""A folder on this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.data.sources.base import FoundFile, RangedSource
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable


class LocalFolder(RangedSource[os.DirEntry[str]]):
    """A folder, with its subfolders or alone.

    Hidden files are ignored. Symbolic links to folders or out of the folder, unreadable subfolders, and
    images and text files that are not regular files are skipped with a reason. A signature is (bytes,
    modification time, status change time, inode), times in nanoseconds.
    """

    request_bytes = 4096

    def __init__(self, folder: Path, *, with_subfolders: bool = True) -> None:
        self.folder = folder.resolve()
        self._with_subfolders = with_subfolders

    @property
    def place(self) -> str:
        """The folder's path."""
        return printable(str(self.folder))

    def list(self) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
        """(name, entry or reason to skip it) of each file."""
        return _walk(self.folder, with_subfolders=self._with_subfolders)

    def stat(self, name: str, entry: os.DirEntry[str]) -> FoundFile | str:
        """A regular file within the folder, or the reason to skip it."""
        try:
            if entry.is_symlink() and not Path(entry.path).resolve(strict=True).is_relative_to(self.folder):
                return "it is a link that leaves the dataset's folder"
            status = entry.stat()
        except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
            return "it is a link to nothing" if entry.is_symlink() else "its status cannot be read"
        if not stat.S_ISREG(status.st_mode):
            return "it is not a regular file"
        signature = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return FoundFile(self, name, signature)

    def read(self, file: FoundFile, *, limit: int) -> bytes:
        """The bytes of a regular file of at most `limit` bytes.

        Raises:
            DataError: The file is larger, not regular or cannot be read; the message does not name it.
        """
        with self._opened(file) as opened:
            data = opened.read(limit + 1)
        if len(data) > limit:
            raise DataError(f"it is over {limit} bytes")
        return data

    def read_range(self, file: FoundFile, start: int, length: int) -> bytes:
        """The bytes of a regular file from `start` on.

        Raises:
            DataError: They cannot be read, or the file changed after the scan; the message does not name it.
        """
        with self.ranges(file) as read:
            return read(start, length)

    @contextmanager
    def ranges(self, file: FoundFile) -> Iterator[Callable[[int, int], bytes]]:
        """`read_range` of one file, which is opened once."""
        with self._opened(file) as opened:

            def read(start: int, length: int) -> bytes:
                status = os.fstat(opened.fileno())
                if (status.st_size, status.st_mtime_ns) != file.signature[:2]:
                    raise DataError("it changed after the scan")
                opened.seek(start)
                return opened.read(length)

            yield read

    def changed_ns(self, file: FoundFile) -> int:
        """The status change time, which also changes when somebody sets the modification time back."""
        return int(file.signature[2])

    @contextmanager
    def _opened(self, file: FoundFile) -> Iterator[BinaryIO]:
        try:
            with open(self.folder / file.name, "rb", opener=_open_at_once) as opened:
                if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                    raise DataError("it is not a regular file")
                yield opened
        except OSError as error:
            raise DataError(f"it cannot be read: {error.strerror}") from error


def local_folder(entry: ImagePlace) -> LocalFolder:
    """The folder of an entry of the dataset json."""
    assert entry.folder is not None, "local images lie in a folder"
    return LocalFolder(entry.folder)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a pipe may have replaced it since the scan."""
    try:
        from os import O_NONBLOCK
    except ImportError:  # Windows, which has no such pipes
        return os.open(path, flags)
    return os.open(path, flags | O_NONBLOCK)


def _walk(root: Path, *, with_subfolders: bool) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
    """(name, entry or reason to skip it)."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as listing:
                entries = list(listing)[::-1]
        except OSError as error:
            if not prefix:
                raise DataError(
                    f"{printable(str(root))}: the dataset's folder cannot be read: {error.strerror}. "
                    "Check instance_data_dir."
                ) from error
            yield prefix.rstrip("/"), f"the folder cannot be read: {error.strerror}"
            continue
        while entries:
            entry = entries.pop()  # its status is large: nothing holds it after its turn
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending += [name + "/"] if with_subfolders else []
            elif entry.is_symlink() and _is_folder(entry):
                yield name, "it is a link to a folder"
            else:
                yield name, entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False

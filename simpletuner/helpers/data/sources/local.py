"""A folder on this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.data.sources.base import FoundFile, ImageSource
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable


class LocalFolder(ImageSource[os.DirEntry[str]]):
    """A folder with its subfolders.

    Hidden files are ignored. Symbolic links to folders or out of the folder, unreadable subfolders, and
    images and text files that are not regular files are skipped with a reason. A signature is (bytes,
    modification time, status change time, inode), times in nanoseconds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @property
    def place(self) -> str:
        """The folder's path."""
        return printable(str(self.folder))

    def list(self) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
        """(name, entry or reason to skip it) of each file."""
        return _walk(self.folder)

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
        try:
            with open(self.folder / file.name, "rb", opener=_open_at_once) as opened:
                if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                    raise DataError("it is not a regular file")
                data = opened.read(limit + 1)
        except OSError as error:
            raise DataError(f"it cannot be read: {error.strerror}") from error
        if len(data) > limit:
            raise DataError(f"it is over {limit} bytes")
        return data

    def changed_ns(self, file: FoundFile) -> int:
        """The status change time, which also changes when somebody sets the modification time back."""
        return int(file.signature[2])


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


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
    """(name, entry or reason to skip it)."""
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False

"""The error of a failed read or write, and the named points at which tests stop a process."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.names import printable


class StorageError(SimpleTunerError):
    """A file or folder cannot be written or read; the message gives the reason and a remedy."""


def storage_error(path: Path, error: OSError, *, needed: int | None = None) -> StorageError:
    """The error for a failed operation on a path; for a full disk with bytes needed and bytes free."""
    where = printable(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = "more" if needed is None else f"{needed} bytes"
        return StorageError(
            f"{where}: the disk or quota is full: {_free_bytes(path)} bytes free, {need} needed. "
            "Free some space or choose another folder; the old content is unchanged."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{where}: no permission to write. Choose a writable folder.")
    return StorageError(f"{where}: {error.strerror or error}. Choose another folder, or repair this one.")


def check_space(path: Path, *, needed: int) -> None:
    """Refuse to begin a write of this many bytes when fewer are free.

    Raises:
        StorageError: The message has both numbers.
    """
    if _free_bytes(path) < needed:
        raise storage_error(path, OSError(errno.ENOSPC, "full"), needed=needed)


def _free_bytes(path: Path) -> int:
    folder = path
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


_actions: list[Callable[[str], None]] = []


def crash_point(name: str) -> None:
    """A point at which a test may stop the process; without a test it does nothing."""
    for action in _actions:
        action(name)


@contextmanager
def at_crash_points(action: Callable[[str], None]) -> Iterator[None]:
    """Call `action` with the name of each crash point that the process passes inside the context."""
    _actions.append(action)
    try:
        yield
    finally:
        _actions.remove(action)

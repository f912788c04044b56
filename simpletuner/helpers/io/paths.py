"""Paths that a user writes, on this system or on another, and what lies below them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\")


def with_slashes(text: str) -> str:
    """A path with / for each backslash, which Windows reads too; unchanged if it begins at a drive."""
    return text if has_drive(text) else text.replace("\\", "/")


def portable(path: Path) -> Path:
    """The path; with / for backslashes, unless a file or folder has the name that it writes with them."""
    if "\\" not in str(path):
        return path
    named = next((each for each in (path, *path.parents) if "\\" in each.name), None)
    return path if named is None or named.exists() else Path(with_slashes(str(path)))


def has_drive(text: str) -> bool:
    """Whether a path begins with a drive of Windows, or a server or the present drive."""
    return _DRIVE.match(text) is not None


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder and below it, links not counted; 0 without any.

    A file that another process removes meanwhile counts nothing.
    """
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            with suppress(OSError):
                total += 0 if file.is_symlink() else file.stat().st_size
    return total

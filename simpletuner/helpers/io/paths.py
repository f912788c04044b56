"""Paths that a user writes, on this system or on another."""

from __future__ import annotations

import re
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

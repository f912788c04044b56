"""Files that a command writes where the user says, without replacing what is there."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path

from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.names import printable


def refuse_existing(files: Iterable[Path], *, overwrite: bool) -> None:
    """Check, before a command's work, that it may write these files.

    Raises:
        StorageError: Some exist, and `overwrite` is false.
    """
    existing = [printable(str(file)) for file in files if file.exists() or file.is_symlink()]
    if existing and not overwrite:
        raise StorageError(
            f"{', '.join(existing)}: exists already. Give another --output, or --overwrite to replace it."
        )


def unused(file: Path) -> Path:
    """The path, or if it exists the first free one with a number: image.png, image-2.png, ..."""
    if not file.exists():
        return file
    numbered = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in count(2))
    return next(each for each in numbered if not each.exists())

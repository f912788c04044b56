"""Paths of a foreign file, which may be of another machine or of Windows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes
from simpletuner.helpers.contracts import Size

HeaderSize = Callable[[Path], Size | None]
"""Reads the size of an image from its header; None for a file that is no image."""
PLACEHOLDER = "datasets/mine"
"""Folder of images where a preset names none."""
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_REPEATED = re.compile(r"(\d+)_(.*)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the paths of a file begin, and how images are measured."""

    folder: Path
    """Folder of the file; of a command line the working directory."""
    header_size: HeaderSize

    def path(self, text: str) -> str:
        """A path as it can be written here: with slashes, and absolute if it lies beside the file only."""
        plain = text.strip()
        if _DRIVE.match(plain) or ("\\" in plain and "/" not in plain):
            plain = PureWindowsPath(plain).as_posix()
        beside = self.folder / plain
        if plain and not os.path.isabs(plain) and not os.path.exists(plain) and beside.exists():
            return os.path.abspath(beside)
        return plain

    def images(self, folder: str, *, with_subfolders: bool) -> list[Path] | None:
        """The images of a folder, in the order of their names; None if it is not here."""
        root = Path(folder)
        if not folder or not root.is_dir():
            return None
        suffixes = image_suffixes()
        files = root.rglob("*") if with_subfolders else root.iterdir()
        return sorted(
            file
            for file in files
            if file.suffix.lower() in suffixes
            and not file.name.startswith(".")
            and conditioned_stem(f"{file.parent.name}/{file.name}") is None
        )

    def sizes(self, images: Sequence[Path]) -> list[Size]:
        """The sizes of the images that can be read."""
        return [size for image in images if (size := self.header_size(image)) is not None]


def is_of_other_system(text: str) -> bool:
    """Whether a path begins with a drive letter, on a system without them."""
    return os.name != "nt" and _DRIVE.match(text) is not None


def repeated_folder(name: str) -> tuple[int, str] | None:
    """(How often, class tokens) of a folder named like 10_sks dog; None for another name."""
    match = _REPEATED.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match and int(match.group(1)) else None


def unique_id(name: str, taken: Sequence[str]) -> str:
    """A dataset's id from a folder's name: a name that fits a folder, and is not taken."""
    plain = re.sub(r'[/\\:*?"<>|\x00-\x1f]+', "-", name).strip(" .-") or "images"
    plain = plain.encode()[:80].decode(errors="ignore")
    number, found = 2, plain
    while found in taken:
        found, number = f"{plain}-{number}", number + 1
    return found

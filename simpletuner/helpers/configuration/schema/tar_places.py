"""Places of tar archives: a folder, one archive, or a pattern of their names."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from pydantic import ValidationInfo

from simpletuner.helpers.configuration.schema.base import input_folder, path_context
from simpletuner.helpers.io.paths import with_slashes

COMPRESSED_TAR = re.compile(r"\.(?:tar\.(?:gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 1_000_000


def is_tar(name: str) -> bool:
    """Whether a path has the name of a tar archive."""
    return name.lower().endswith(".tar")


def tar_place(value: object, info: ValidationInfo) -> Path | str:
    """A folder on this machine, or a text: the path of an archive in one, or a pattern of such paths.

    Raises:
        ValueError: There is no such folder, or the name is none of a tar archive.
    """
    if not isinstance(value, str) or not (is_tar(value) or COMPRESSED_TAR.search(value)):
        return input_folder(value, info)
    text = with_slashes(value)
    existing = path_context(info).input_path(path_context(info).expand(text))
    if existing is not None and existing.is_dir():
        return existing
    folder, _, names = text.rpartition("/")
    names = path_context(info).expand(names)
    check_names(names)
    return str(input_folder(folder or ("/" if text.startswith("/") else "."), info) / names)


def check_names(names: str) -> None:
    """Check a pattern of names of archives.

    Raises:
        ValueError: It cannot be expanded, or they are compressed.
    """
    if COMPRESSED_TAR.search(names):
        raise ValueError(
            "is compressed, so its images cannot be read alone. Decompress it (gunzip, unxz, zstd -d) and "
            "give the .tar."
        )
    expanded(names)


def split_place(place: Path | str) -> tuple[str, str]:
    """The folder or URL that holds archives, and the pattern of their names; empty for all of them."""
    if isinstance(place, Path):
        return str(place), ""
    folder, _, names = with_slashes(place).rpartition("/")
    return (folder or "/", names) if is_tar(names) else (place, "")


def expanded(pattern: str) -> tuple[str, ...]:
    """The names that a pattern with {000..012} or {a,b} stands for; * and ? stay.

    Raises:
        ValueError: The braces hold something else, or too many names.
    """
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    number = 1
    for each in choices:
        number *= len(each)
    if number > _MOST_NAMES:
        raise ValueError(f"stands for {number:,} names; at most {_MOST_NAMES:,} are taken.")
    return tuple("".join(parts) for parts in product(*choices))


def _choices(inside: str) -> list[str]:
    """What a pair of braces stands for."""
    if match := _RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        if last - first >= _MOST_NAMES:
            raise ValueError(f"stands for {last - first + 1:,} names; at most {_MOST_NAMES:,} are taken.")
        is_padded = any(len(end) > 1 and end.startswith("0") for end in match.groups())
        width = max(map(len, match.groups())) if is_padded else 0
        if first <= last:
            return [f"{number:0{width}}" for number in range(first, last + 1)]
    elif "," in inside:
        return inside.split(",")
    raise ValueError(f"{{{inside}}}: write {{000..012}}, from the first to the last number, or {{a,b}}.")

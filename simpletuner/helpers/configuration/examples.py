"""Lists and copies the example configurations."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[2]
PLACES = (_PACKAGE / "examples", _PACKAGE.parent / "config" / "examples")
"""In an installed package; in the repository."""
LIST = "README.md"
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")
_ROW = re.compile(r"^\| `([\w-]+)` \| (.+) \|$", re.MULTILINE)


def examples() -> dict[str, str]:
    """Name -> description of every example, without the addresses of its links."""
    rows = _ROW.findall((_folder() / LIST).read_text(encoding="utf-8"))
    return {name: _LINK.sub(r"\1", description) for name, description in rows}


def copy_example(name: str, folder: Path | None = None) -> Path:
    """Copy the files of an example to a folder, `config/NAME` by default; the config.json among them.

    Raises:
        ConfigError: The example is unknown, or a file exists already or cannot be written.
    """
    known = examples()
    if name not in known:
        raise ConfigError(
            f"Unknown example {name!r}. Known examples: {', '.join(known)}.{nearest(name, known)}"
        )
    folder = Path("config", name) if folder is None else folder
    copies = {file: folder / file.name for file in sorted((_folder() / name).iterdir())}
    present = [copy.name for copy in copies.values() if os.path.lexists(copy)]
    if present:
        raise ConfigError(
            f"{folder}: {', '.join(present)} exists already. Nothing was copied. Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, copy in copies.items():
            shutil.copyfile(file, copy)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}. Name another folder.") from error
    return folder / "config.json"


def _folder() -> Path:
    return next(place for place in PLACES if place.is_dir())

"""The configuration file that a user means: by its path, its folder, or its name below config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.errors import ConfigError

FILE = "config.json"
OTHER_FORMS = ("config.toml", "config.env")
"""Names that a folder may hold in its place."""
DEFAULT = Path("config") / FILE
PLACES = (Path(), Path("config"), Path("config/examples"))
"""A name is looked for below each of these folders of the working directory."""


def choose_config(given: Path | None, arguments: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The configuration file, and the arguments that override its values.

    The file is `given`, else the first argument if that is neither an option nor key=value, else DEFAULT.

    Raises:
        ConfigError: There is no such configuration, or two are given.
    """
    is_first = bool(arguments) and not arguments[0].startswith("--") and "=" not in arguments[0]
    if not is_first:
        return find_config(DEFAULT if given is None else given), tuple(arguments)
    first, *overrides = arguments
    if given is not None:
        raise ConfigError(
            f"Two configurations are given: {first} and --config {given}. Keep one; a value is key=value."
        )
    return find_config(Path(first)), tuple(overrides)


def find_config(path: Path) -> Path:
    """The file of a path with or without .json, of a folder with a config.json, or of a folder below config.

    Raises:
        ConfigError: There is none.
    """
    for place in PLACES:
        candidate = place / path
        in_folder = (candidate / name for name in (FILE, *OTHER_FORMS))
        files = (candidate, candidate.with_name(f"{candidate.name}.json"), *in_folder)
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            return found
    if path.is_dir():
        raise ConfigError(f"{path}: this folder has no {FILE}. Name the configuration file itself.")
    names = [file.parent.name for place in PLACES[1:] for file in sorted(place.glob(f"*/{FILE}"))]
    hint = nearest(path.name, names) or (f" Configurations here: {', '.join(names)}." if names else "")
    raise ConfigError(
        f"{path}: no such configuration. Give a file, a folder with a {FILE}, or the name of such a folder "
        f"below config; values follow as key=value.{hint}"
    )

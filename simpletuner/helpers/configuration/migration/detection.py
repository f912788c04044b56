"""Finds out which program a file or command line is for, and has it read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.ai_toolkit import is_ai_toolkit, read_ai_toolkit
from simpletuner.helpers.configuration.migration.command_line import read_command
from simpletuner.helpers.configuration.migration.diffusers_scripts import read_diffusers
from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.migration.kohya import (
    KohyaRun,
    flat,
    is_dataset_file,
    read_kohya,
    script_of,
)
from simpletuner.helpers.configuration.migration.kohya_graphical import read_graphical
from simpletuner.helpers.configuration.migration.onetrainer import is_one_trainer, read_one_trainer
from simpletuner.helpers.configuration.migration.paths import HeaderSize, Place
from simpletuner.helpers.configuration.migration.reading import read_structured, read_text
from simpletuner.helpers.configuration.migration.simpletuner_files import (
    FILES,
    is_simpletuner,
    read_simpletuner,
)
from simpletuner.helpers.configuration.migration.table import PROGRAMS, load_table
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError

T = TypeVar("T")
_STRUCTURED = (".toml", ".yaml", ".yml", ".json")


def is_command(source: str) -> bool:
    """Whether a text is a command line, not a path."""
    if os.path.exists(source):  # unlike Path.exists it takes a text that is too long for a path
        return False
    return ".py" in source and any(each.isspace() for each in source.strip())


def translate(source: str, *, specs: Mapping[str, ModelSpec], header_size: HeaderSize) -> Draft:
    """The configuration that a file or a command line means.

    Args:
        source: The path of a file, or the command line itself.
        specs: Name -> spec of every model family.
        header_size: Reads the size of an image.

    Raises:
        ConfigError: It is no file of a known program, of another model family, or damaged.
    """
    if is_command(source):
        return _of_command(source, Place(Path.cwd(), header_size), specs)
    path = Path(source)
    if os.path.isdir(path):
        path = _file_in(path)
    if os.path.isfile(path):
        place = Place(path.resolve().parent, header_size)
        if path.suffix.lower() == ".env":
            return read_simpletuner(path, place, specs)
        if path.suffix.lower() not in _STRUCTURED:
            return _of_command(read_text(path), place, specs)
        return _of_content(read_structured(path), path, place=place, specs=specs)
    raise ConfigError(
        f"{source}: no such file. Give a toml, yaml or json of another program, a script with its command "
        "line, or the command line in quotes."
    )


def _of_content(content: JsonValue, path: Path, *, place: Place, specs: Mapping[str, ModelSpec]) -> Draft:
    if not isinstance(content, dict) or not content:
        text = (
            "a list of datasets, concepts or samples, but no run. Give the file that names it."
            if isinstance(content, list)
            else "empty, so there is nothing to translate."
        )
        raise ConfigError(f"{path}: {text}")
    with_place = _Source(path)
    if is_simpletuner(content):
        return read_simpletuner(path, place, specs)
    if is_ai_toolkit(content):
        return with_place(read_ai_toolkit, content, place, specs)
    if is_one_trainer(content):
        return with_place(read_one_trainer, content, place, specs)
    if "LoRA_type" in content:
        graphical = with_place(read_graphical, content)
        return with_place(read_kohya, KohyaRun(graphical.script, graphical.values, place, specs, graphical))
    if "model_list" in content or "num_cpu_threads_per_process" in content:
        raise ConfigError(
            f"{path}: kohya's graphical program, without LoRA_type: it trains the whole model. Only adapters "
            "are trained here."
        )
    if path.suffix.lower() == ".toml" and is_dataset_file(content):
        raise ConfigError(
            f"{path}: kohya's datasets without a run. Give the command or the toml that names it as "
            "dataset_config."
        )
    values = flat(content)
    if path.suffix.lower() == ".toml" and any(key in values for key in load_table("kohya").rows("command")):
        return with_place(read_kohya, KohyaRun(script_of(values), values, place, specs))
    raise ConfigError(
        f"{path}: not known as a file of {', '.join(load_table(each).program for each in PROGRAMS)}. It may "
        "be cut off, or of another program."
    )


def _file_in(folder: Path) -> Path:
    """SimpleTuner's file in a folder.

    Raises:
        ConfigError: There is none.
    """
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(f"{folder}: has none of {', '.join(FILES)}. Name the file itself.")
    return found


class _Source:
    """Calls a reader, and puts the name of the file before its error."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, reader: Callable[..., T], *arguments: object) -> T:
        try:
            return reader(*arguments)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {str(error).removeprefix(f'{self._path}: ')}") from None


def _of_command(text: str, place: Place, specs: Mapping[str, ModelSpec]) -> Draft:
    command = read_command(text)
    if command.script in load_table("kohya").facts["scripts"]:
        launcher = {key: value for key, value in command.launcher.items() if key in ("num_processes",)}
        values = launcher | _config_file(command.options, place) | dict(command.options)
        return read_kohya(KohyaRun(command.script, values, place, specs))
    if command.script in load_table("diffusers").facts["scripts"]:
        return read_diffusers(command, place, specs)
    known: list[str] = []
    for program in ("kohya", "diffusers"):
        scripts: Mapping[str, Any] = load_table(program).facts["scripts"]
        known += [name for name, fact in scripts.items() if "refused" not in fact]
    raise ConfigError(f"{command.script}.py is not known here. Known scripts are {', '.join(known)}.")


def _config_file(options: Mapping[str, JsonValue], place: Place) -> dict[str, JsonValue]:
    """The keys of the toml that a command of kohya's scripts names; the command's own come after them."""
    name = str(options.get("config_file") or "")
    if not name:
        return {}
    path = Path(place.path(name if name.endswith(".toml") else f"{name}.toml"))
    if not path.is_file():
        raise ConfigError(f"--config_file: {path} is not here. Correct the path.")
    content = read_structured(path)
    return flat(content) if isinstance(content, dict) else {}

"""Reads a foreign file: toml, yaml, json or text. One error says where the file is damaged."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.command_line import scalar
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import LARGEST_FILE_BYTES, parse_json
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import one_line_reason

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: It cannot be read, or is not UTF-8.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {LARGEST_FILE_BYTES >> 20} MiB. Check the path.")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error


def read_structured(path: Path) -> JsonValue:
    """The value of a toml, yaml or json file, by its suffix.

    Raises:
        ConfigError: The file is damaged, or a yaml with anchors; the message has the line.
    """
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return _toml(text, path)
    if suffix in (".yaml", ".yml"):
        return _yaml(text, path)
    problems = Problems()
    value = parse_json(text, source=str(path), problems=problems)
    problems.raise_if_any()
    return value


def _toml(text: str, path: Path) -> JsonValue:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = (
            " In double quotes a backslash counts as an escape: put Windows paths in single quotes."
            if "\\" in text
            else " The file may have been cut off."
        )
        raise ConfigError(f"{path}: not a complete toml: {one_line_reason(error)}.{hint}") from error


def _yaml(text: str, path: Path) -> JsonValue:
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor):
                line = event.start_mark.line + 1
                raise ConfigError(
                    f"{path}, line {line}: the anchor {event.anchor!r}. Anchors and aliases are not read: "
                    "write the settings out where the alias stands."
                )
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not a complete yaml: {one_line_reason(error)}.") from error
    return _with_numbers(value)


def _with_numbers(value: JsonValue) -> JsonValue:
    """The value with numbers in place of texts such as 1e-4, which YAML 1.1 does not take for one."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return scalar(value)
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _with_numbers(each) for key, each in value.items()}
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def flattened(values: JsonValue, prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    """(Key with dots, value) of nested objects; lists stay values."""
    if not isinstance(values, dict):
        yield prefix, values
        return
    for key, value in values.items():
        yield from flattened(value, f"{prefix}.{key}" if prefix else key)

"""Reads the command line of a training script, with the variables that the same text sets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath

from pydantic import JsonValue

from simpletuner.helpers.errors import ConfigError

_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n[ \t]*")
_COMMENT = re.compile(r"^\s*(#|::|rem\b)", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+|set\s+|\$(?:env:)?)?(\w+)\s*=\s*(.*?)\s*;?\s*$", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(?:env:)?(\w+)|%(\w+)%", re.IGNORECASE)
# A backslash before a letter is one of a Windows path: no shell line means it as an escape.
_WINDOWS_SEPARATOR = re.compile(r"(?<!\\)\\(?=[\w.(\[-])")
_SCRIPT = re.compile(r"[\w./\\:-]*\.py\b")
_ENDS = {";", "&&", "||", "|", ">", ">>", "&", "2>&1"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Command:
    """One call of a training script."""

    script: str
    """Name of the file, without folder and .py."""
    options: Mapping[str, JsonValue]
    """Name without dashes, with underscores -> value; true for a flag, a list for several values."""
    launcher: Mapping[str, JsonValue]
    """Options before the script, of accelerate launch or torchrun."""


def read_command(text: str) -> Command:
    """The only call of a Python script in a text.

    Raises:
        ConfigError: There is none or more than one, a variable is not set, or a quote is not closed.
    """
    variables: dict[str, str] = {}
    calls: list[str] = []
    for line in _CONTINUED.sub(" ", text).splitlines():
        assignment = _ASSIGNMENT.match(line)
        if _COMMENT.match(line) or not line.strip():
            continue
        if assignment and not _SCRIPT.search(line.partition("=")[0]) and " --" not in line:
            variables[assignment.group(1)] = _filled(assignment.group(2).strip("\"'"), variables)
        elif _SCRIPT.search(line):
            calls.append(line)
    if len(calls) != 1:
        found = "no call of a Python script" if not calls else f"{len(calls)} calls of Python scripts"
        raise ConfigError(
            f"The command line has {found}. Give one: accelerate launch train.py --option value ..."
        )
    call = _filled(calls[0], variables)
    missing = sorted({next(filter(None, match.groups())) for match in _VARIABLE.finditer(_unquoted(call))})
    if missing:
        raise ConfigError(
            f"The command line has shell variables that it does not set: {', '.join(missing)}. Put their "
            f"values in their place, or lines such as {missing[0]}=value before it."
        )
    return _parsed(call)


def scalar(text: str) -> JsonValue:
    """A number if the text is one, else the text."""
    if not _NUMBER.fullmatch(text):
        return text
    return float(text) if any(each in text for each in ".eE") else int(text)


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = next(filter(None, match.groups()))
        return variables.get(name, match.group())

    return _VARIABLE.sub(value, text)


def _unquoted(text: str) -> str:
    """The text without its parts in single quotes, where a shell fills in nothing."""
    return re.sub(r"'[^']*'", "", text)


def _parsed(call: str) -> Command:
    try:
        tokens = shlex.split(_WINDOWS_SEPARATOR.sub(r"\\\\", call))
    except ValueError as error:
        raise ConfigError(
            f"The command line cannot be split: {str(error).lower()}. Close every quote."
        ) from None
    end = next((index for index, token in enumerate(tokens) if token in _ENDS), len(tokens))
    tokens = tokens[:end]
    place = next((index for index, token in enumerate(tokens) if token.endswith(".py")), None)
    if place is None:
        raise ConfigError(
            "The command line has no training script: name it before its options, as in train.py."
        )
    script = PureWindowsPath(tokens[place]).stem
    return Command(script, dict(_options(tokens[place + 1 :])), dict(_options(tokens[:place])))


def _options(tokens: list[str]) -> Iterator[tuple[str, JsonValue]]:
    name, values = "", list[str]()
    for token in tokens:
        if token.startswith("--"):
            if name:
                yield _option(name, values)
            name, has_value, value = token[2:].partition("=")
            values = [value] if has_value else []
        elif name:
            values.append(token)
    if name:
        yield _option(name, values)


def _option(name: str, values: list[str]) -> tuple[str, JsonValue]:
    numbers = [scalar(value) for value in values]
    value: JsonValue = True if not numbers else numbers[0] if len(numbers) == 1 else numbers
    return name.replace("-", "_"), value

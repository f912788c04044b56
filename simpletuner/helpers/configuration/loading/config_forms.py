"""The forms of a configuration file: json, an export of SimpleTuner's Web-UI, config.env and config.toml."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import parse_json, read_text

_EXPORTED = "config"
"""Key of a Web-UI export that holds the configuration."""
_EXPORT_KEYS = frozenset({"_metadata", "name", "description", "tags", "created_at", "modified_at", "version"})
_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)(\+?)=(.*)")
_REFERENCE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


def read_config(path: Path, *, source: str, problems: Problems) -> tuple[JsonValue | None, list[Decision]]:
    """The values of a configuration file under SimpleTuner's names, and what was left out of it.

    Notes a problem under `source` and returns None where nothing can be read.
    """
    text = read_text(path, source=source, problems=problems)
    if text is None:
        return None, []
    if path.suffix == ".env":
        return _from_env(text)
    if path.suffix == ".toml":
        return _from_toml(text, source=source, problems=problems), []
    decisions: list[Decision] = []

    def note_rest(rest: str) -> None:
        decisions.append(
            Decision("", rest[:60], "no effect", "", "A second JSON value follows the first: not read.")
        )

    values = parse_json(text, source=source, problems=problems, on_second=note_rest)
    if isinstance(values, dict) and isinstance(values.get(_EXPORTED), dict) and "model_family" not in values:
        others = {key: value for key, value in values.items() if key != _EXPORTED}
        if others.keys() <= _EXPORT_KEYS:
            decisions += [
                Decision(key, value, "no effect", "", "About the export of the Web-UI.")
                for key, value in others.items()
            ]
            return values[_EXPORTED], decisions
    return values, decisions


def _from_toml(text: str, *, source: str, problems: Problems) -> JsonValue | None:
    import tomllib  # only for this form

    try:
        # Dates and times become texts.
        values: JsonValue = json.loads(json.dumps(tomllib.loads(text), default=str))
    except tomllib.TOMLDecodeError as error:
        problems.add(source, "", f"is not TOML: {error}.")
        return None
    return values


@cache
def _names() -> Mapping[str, Any]:
    path = Path(__file__).with_name("translation.json")
    names: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config.env"]
    return names


def environment_names() -> Mapping[str, str]:
    """SimpleTuner's variable of config.env -> its key."""
    names: Mapping[str, str] = _names()["keys"]
    return names


def _from_env(text: str) -> tuple[JsonValue, list[Decision]]:
    """The keys of SimpleTuner's variables; others have no effect there either."""
    names = _names()
    variables, decisions = _assignments(text)
    values: dict[str, JsonValue] = {}
    for name, value in variables.items():
        if name in names["launch"]:
            decisions.append(Decision(name, value, "no effect", "", "Read by train.sh, not as a key."))
        elif name in names["keys"]:
            values[names["keys"][name]] = value
        elif name not in names["families"] and name not in names["arguments"]:
            decisions.append(Decision(name, value, "no effect", "", "No key of a configuration."))
    flags = {name: value.lower() == "true" for name, value in variables.items() if name in names["families"]}
    if flags and "model_family" not in values:
        chosen = [names["families"][name] for name, is_on in flags.items() if is_on]
        values["model_family"] = chosen[0] if chosen else names["other_family"]
        decisions += [
            Decision(name, variables[name], "translated", f"model_family: {values['model_family']}", "")
            for name in flags
        ]
    for name in names["arguments"]:
        values |= _arguments(variables.get(name, ""))
    return {key: value for key, value in values.items() if value != ""}, decisions


def _assignments(text: str) -> tuple[dict[str, str], list[Decision]]:
    """Name -> value of each line, with references to earlier names replaced; and the other lines."""
    variables: dict[str, str] = {}
    others: list[Decision] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            if line.strip() and not line.lstrip().startswith("#"):
                others.append(
                    Decision(f"line {number}", line.strip()[:60], "no effect", "", "Not NAME=value.")
                )
            continue
        name, plus, written = match.groups()
        value = _unquoted(written, variables)
        variables[name] = f"{variables.get(name, '')} {value}".strip() if plus else value
    return variables, others


def _unquoted(written: str, variables: Mapping[str, str]) -> str:
    written = written.strip()
    if written[:1] in ("'", '"'):
        closing = written.find(written[0], 1)
        inner = written[1:] if closing < 0 else written[1:closing]
        if written[0] == "'":
            return inner
    else:
        inner = re.split(r"\s+#", written, maxsplit=1)[0]

    def referred(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return variables.get(name, os.environ.get(name, match[0]))

    return _REFERENCE.sub(referred, inner).strip()


def _arguments(text: str) -> dict[str, JsonValue]:
    """Keys of arguments such as "--lora_rank=16 --use_dora"."""
    try:
        tokens = shlex.split(text)
    except ValueError:
        tokens = text.split()
    values: dict[str, JsonValue] = {}
    while tokens:
        name, equals, value = tokens.pop(0).partition("=")
        key = name.removeprefix("--")
        if equals:
            values[key] = value
        elif tokens and not tokens[0].startswith("--"):
            values[key] = tokens.pop(0)
        else:
            values[key] = True
    return values

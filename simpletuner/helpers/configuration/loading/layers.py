"""config.json and the command line as one mapping of keys to raw values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.unsupported_keys import key_problem, unsupported_keys
from simpletuner.helpers.configuration.schema.base import Section, admits_none, holds_text
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import parse_json

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "validation_steps": "validation_step_interval",
        "checkpointing_steps": "checkpoint_step_interval",
        "save_total_limit": "checkpoints_total_limit",
        "model_flavor": "model_flavour",
    }
)
"""Older name of a key -> its name."""
COMMAND_LINE = "command line"
_NUMBER = re.compile(r"-\.?\d")
_SWITCH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "0", "1"})


@dataclass(frozen=True, slots=True)
class RawValue:
    """A value of config.json or the command line."""

    value: JsonValue
    """With the values of environment variables."""
    raw: JsonValue
    """With their placeholders, as written."""
    source: str
    """The file, or COMMAND_LINE."""


@dataclass(frozen=True)
class Keys:
    """Every key of config.json and the section that owns it."""

    owners: Mapping[str, type[Section]]

    def is_switch(self, key: str) -> bool:
        """Whether a key is true or false."""
        return key in self.owners and self.owners[key].model_fields[key].annotation is bool


def merge_layers(
    values: Mapping[str, JsonValue],
    overrides: Sequence[str],
    keys: Keys,
    *,
    file: str,
    environment: Environment,
) -> dict[str, RawValue]:
    """The supported keys of config.json and the command line, which wins; notes every other key.

    A null removes the key, so that it takes its default, unless null is among its values.
    """
    given = _parse_overrides(overrides, keys, environment.problems)
    layers = _supported(values.items(), keys, source=file, environment=environment)
    layers |= _supported(given.items(), keys, source=COMMAND_LINE, environment=environment)
    return {
        key: raw for key, raw in layers.items() if raw.value is not None or admits_none(keys.owners[key], key)
    }


def _supported(
    items: Iterable[tuple[str, JsonValue]], keys: Keys, *, source: str, environment: Environment
) -> dict[str, RawValue]:
    problems = environment.problems
    supported: dict[str, RawValue] = {}
    spellings: dict[str, str] = {}
    for spelling, value in items:
        key = _canonical(spelling)
        if key in spellings:
            problems.add(source, spelling, f"given twice, as {spellings[key]} and as {spelling}. Keep one.")
        spellings[key] = spelling
        if key in keys.owners:
            is_text = holds_text(keys.owners[key], key)
            filled = environment.fill(value, source=source, key=key, is_text=is_text)
            supported[key] = RawValue(filled, value, source)
        elif problem := key_problem("config.json", key, value, known=[*keys.owners, *ALIASES]):
            problems.add(source, key, problem)
    return supported


def _canonical(spelling: str) -> str:
    key = spelling.removeprefix("--")
    return ALIASES.get(key, key)


def _parse_overrides(overrides: Sequence[str], keys: Keys, problems: Problems) -> dict[str, JsonValue]:
    """key=value, --key=value, --key value, and --key alone for true; the last of several values counts."""
    values: dict[str, JsonValue] = {}
    for key, text in _pairs(overrides, keys, problems):
        values[key] = True if text is None else _parse_value(key, text)
    return values


def _pairs(overrides: Sequence[str], keys: Keys, problems: Problems) -> Iterator[tuple[str, str | None]]:
    """Key and text of each override; None for a key alone."""
    rest = list(overrides)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.partition("=")
        key = _canonical(name)
        if equals and key:
            yield key, text
        elif not token.startswith("--") or not key:
            known = key in keys.owners
            advice = f"Write {key}=value." if known else "Write key=value; the configuration comes first."
            problems.add(COMMAND_LINE, name if known else "", f"an argument is not key=value. {advice}")
        elif rest and _is_value_of(key, rest[0], keys):
            yield key, rest.pop(0)
        else:
            yield key, None


def _is_value_of(key: str, token: str, keys: Keys) -> bool:
    if keys.is_switch(key):
        return token.lower() in _SWITCH_WORDS
    return _NUMBER.match(token) is not None or not _starts_another(token, keys)


def _starts_another(token: str, keys: Keys) -> bool:
    if token.startswith("--"):
        return True
    name = _canonical(token.partition("=")[0])
    return "=" in token and (name in keys.owners or name in unsupported_keys("config.json"))


def _parse_value(key: str, text: str) -> JsonValue:
    if text.strip().lower() in ("null", "none"):
        return None
    if text.lstrip()[:1] in ("{", "[") and not text.lstrip().startswith("{env:"):
        problems = Problems()
        value = parse_json(text, source=key, problems=problems)
        return text if len(problems) else value
    return text

"""Config.json and the command line as one flat set of keys, each with where it was given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.known_keys import ALIASES, CONFIG_KEYS, unsupported
from simpletuner.helpers.configuration.schema.base import Section, admits_none, holds_text
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems, unknown_key
from simpletuner.helpers.configuration.text.reading import parse_json

COMMAND_LINE = "command line"
_NUMBER = re.compile(r"-\.?\d")
_SWITCH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "0", "1"})


@dataclass(frozen=True, slots=True)
class RawValue:
    """A value that the user gave."""

    value: JsonValue
    """With environment variables filled in."""
    written: JsonValue
    """As it was written."""
    source: str
    """The file, or the command line."""


@dataclass(frozen=True)
class Keys:
    """Every key of config.json and the section that owns it."""

    owners: Mapping[str, type[Section]]

    def is_switch(self, key: str) -> bool:
        """Whether a key is true or false."""
        return key in self.owners and self.owners[key].model_fields[key].annotation is bool


def plain_key(key: str) -> str:
    """A key without leading dashes, under its present name."""
    plain = key.removeprefix("--")
    return ALIASES.get(plain, plain)


def from_file(
    values: Mapping[str, JsonValue], keys: Keys, *, source: str, problems: Problems, environment: Environment
) -> dict[str, RawValue]:
    """The accepted keys of a config.json; every other key is noted."""
    return _accepted(values.items(), keys, source=source, problems=problems, environment=environment)


def from_command_line(
    overrides: Sequence[str], keys: Keys, *, problems: Problems, environment: Environment
) -> dict[str, RawValue]:
    """The accepted overrides: key=value, --key=value, --key value, --key alone for true; later ones win."""
    pairs = list(_pairs(overrides, keys, problems))
    values: dict[str, JsonValue] = {}
    for key, text in pairs:
        values.pop(key, None)
        values[key] = _typed(key, text, problems)
    return _accepted(values.items(), keys, source=COMMAND_LINE, problems=problems, environment=environment)


def merge(*layers: Mapping[str, RawValue], keys: Keys) -> dict[str, RawValue]:
    """The layers as one, later ones on top; null stands for the default where it is no value of its own."""
    merged: dict[str, RawValue] = {}
    for layer in layers:
        merged |= layer
    return {
        key: given
        for key, given in merged.items()
        if given.value is not None or admits_none(keys.owners[key], key)
    }


def _accepted(
    items: Iterable[tuple[str, JsonValue]],
    keys: Keys,
    *,
    source: str,
    problems: Problems,
    environment: Environment,
) -> dict[str, RawValue]:
    accepted: dict[str, RawValue] = {}
    written: dict[str, str] = {}
    for original, value in items:
        key = plain_key(original)
        if key in written and source != COMMAND_LINE:
            problems.add(source, original, f"given twice, as {written[key]} and as {original}. Keep one.")
        written[key] = original
        if key in keys.owners:
            is_text = holds_text(keys.owners[key], key)
            filled = environment.filled(value, source=source, key=key, is_text=is_text)
            accepted[key] = RawValue(filled, value, source)
        elif key in CONFIG_KEYS:
            if not CONFIG_KEYS[key].is_noop(value):
                problems.add(source, key, unsupported(CONFIG_KEYS[key]))
        else:
            problems.add(source, key, unknown_key(key, [*keys.owners, *ALIASES]))
    return accepted


def _pairs(overrides: Sequence[str], keys: Keys, problems: Problems) -> Iterable[tuple[str, str | None]]:
    """Key and text of each override; None for a key alone."""
    rest = list(overrides)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.partition("=")
        key = plain_key(name)
        if equals and key:
            yield key, text
        elif not token.startswith("--") or not key:
            known = key in keys.owners
            advice = f"Write {key}=value." if known else "Write key=value."
            problems.add(COMMAND_LINE, name if known else "", f"an argument is not key=value. {advice}")
        elif rest and _is_value_of(key, rest[0], keys):
            yield key, rest.pop(0)
        else:
            yield key, None


def _is_value_of(key: str, token: str, keys: Keys) -> bool:
    if keys.is_switch(key):
        return token.lower() in _SWITCH_WORDS
    name = plain_key(token.partition("=")[0])
    starts_another = token.startswith("--") or ("=" in token and (name in keys.owners or name in CONFIG_KEYS))
    return _NUMBER.match(token) is not None or not starts_another


def _typed(key: str, text: str | None, problems: Problems) -> JsonValue:
    if text is None:
        return True
    if text.strip().lower() in ("null", "none"):
        return None
    if text.lstrip()[:1] in ("{", "[") and not text.lstrip().startswith("{env:"):
        own = Problems()
        value = parse_json(text, source=key, problems=own)
        return text if len(own) else value
    return text

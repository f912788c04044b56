"""config.json and the command line as one mapping of keys to raw values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.relations import Context
from simpletuner.helpers.configuration.loading.translation import (
    File,
    rename_keys,
    tables,
    translate_values,
)
from simpletuner.helpers.configuration.loading.unsupported_keys import unsupported_keys
from simpletuner.helpers.configuration.schema.base import Section, admits_none, holds_text, takes_empty_text
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import parse_json
from simpletuner.helpers.contracts import ModelSpec

FILE: File = "config.json"
"""Kind of file, in the tables of translation."""
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


@dataclass(frozen=True)
class Layers:
    """config.json and the command line in one."""

    raw: Mapping[str, RawValue]
    """The supported keys."""
    decisions: tuple[Decision, ...]
    """What became of every key that does not stay as it is."""


def merge_layers(
    values: Mapping[str, JsonValue],
    overrides: Sequence[str],
    keys: Keys,
    *,
    file: str,
    environment: Environment,
    families: Mapping[str, ModelSpec],
) -> Layers:
    """The supported keys of config.json and the command line, which wins; notes every other key.

    A null removes the key, so that it takes its default, unless null is among its values.
    """
    problems = environment.problems
    given: dict[str, RawValue] = {}
    decisions: list[Decision] = []
    for source, layer in ((file, values), (COMMAND_LINE, _parse_overrides(overrides, keys, problems))):
        renamed = rename_keys(FILE, layer.items())
        spelt = {name for key in layer for name in (key, key.removeprefix("--"))}
        decisions += _noted(renamed.decisions, dict.fromkeys(spelt, source), problems)
        for key, value in renamed.values.items():
            is_text = key in keys.owners and holds_text(keys.owners[key], key)
            is_filled = key in keys.owners or key in tables(FILE).arguments
            filled = environment.fill(value, source=source, key=key, is_text=is_text) if is_filled else value
            given[key] = RawValue(filled, value, source)
    given = {key: raw for key, raw in given.items() if raw.value is not None or _is_none_a_value(key, keys)}
    family = given["model_family"].value if "model_family" in given else None
    spec = families.get(family) if isinstance(family, str) else None
    everyone = frozenset().union(*(each.own_keys for each in families.values()))
    present = {key: raw.value for key, raw in given.items()}
    translation = translate_values(
        FILE,
        present,
        owned=keys.owners,
        known=[*keys.owners, *tables(FILE).aliases],
        context=Context(present, spec, everyone - spec.own_keys if spec is not None else frozenset()),
        takes_empty=lambda key: takes_empty_text(keys.owners[key], key),
    )
    decisions += _noted(translation.decisions, {key: each.source for key, each in given.items()}, problems)
    raw = {
        key: given[key]
        if key in given and given[key].value == value
        else RawValue(value, value, given[key].source if key in given else file)
        for key, value in translation.values.items()
    }
    return Layers(raw, tuple(decisions))


def _is_none_a_value(key: str, keys: Keys) -> bool:
    return key in keys.owners and admits_none(keys.owners[key], key)


def _noted(
    decisions: Iterable[Decision], sources: Mapping[str, str], problems: Problems
) -> Iterator[Decision]:
    """The decisions, with a problem noted for each key that cannot be translated."""
    for each in decisions:
        if each.outcome == "not translated":
            problems.add(sources[each.key], each.key, each.text)
        yield each


def _canonical(spelling: str) -> str:
    key = spelling.removeprefix("--")
    return tables(FILE).aliases.get(key, key)


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

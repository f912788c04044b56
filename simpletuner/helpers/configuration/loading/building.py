"""Builds a section from values and notes each problem at its key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, get_args

from pydantic import JsonValue, ValidationError
from pydantic_core import ErrorDetails

from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.base import PathContext, Section
from simpletuner.helpers.configuration.text.problems import Problems, describe, shown, unknown_key

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Validated(Generic[S]):
    """The result of validating a section."""

    section: S | None
    """With defaults in place of invalid values; None if a section cannot be built from the rest."""
    invalid_keys: frozenset[str]

    def if_valid(self, *keys: str) -> S | None:
        """The section, or None if any of these keys is invalid."""
        return self.section if not self.invalid_keys & set(keys) else None


@dataclass(frozen=True)
class Source:
    """Origin of a section's values, for messages and paths."""

    problems: Problems
    name_of: Callable[[str], str]
    """Key -> name of the file, or the command line."""
    context: PathContext
    prefix: str = ""
    """Precedes each key in messages."""

    def add(self, key: str, text: str) -> None:
        """Note a problem of a key."""
        self.problems.add(self.name_of(key), f"{self.prefix}{key}", text)

    def reject(self, key: str, value: JsonValue, text: str) -> None:
        """Note a problem of a key and show its value."""
        self.add(key, f"{shown(value)}: {text}")

    def with_names(self, **names: str) -> Source:
        """The same source with more {name} placeholders for paths."""
        return replace(self, context=replace(self.context, names={**self.context.names, **names}))


def build(
    section: type[S],
    values: Mapping[str, object],
    source: Source,
    *,
    placeholders: Mapping[str, object] | None = None,
) -> Validated[S]:
    """Validate values as a section and note each problem at its key.

    Args:
        section: The class.
        values: Key -> value.
        source: Origin of the values.
        placeholders: Stand in for required keys that are missing or invalid, so that the rest is checked.
    """
    try:
        return Validated(section.model_validate(values, context=source.context), frozenset())
    except ValidationError as error:
        details = error.errors(include_url=False)
    invalid = _note(details, source, section=section, ignoring=frozenset())
    usable = {key: value for key, value in values.items() if key not in invalid}
    missing = {key: value for key, value in (placeholders or {}).items() if key not in usable}
    try:
        return Validated(section.model_validate({**missing, **usable}, context=source.context), invalid)
    except ValidationError as error:
        # pydantic looks for contradictions only once every single value is valid.
        _note(error.errors(include_url=False), source, section=section, ignoring=invalid)
        return Validated(None, invalid)


def _note(
    details: list[ErrorDetails], source: Source, *, section: type[Section], ignoring: frozenset[str]
) -> frozenset[str]:
    """Note each error, except at ignored keys; returns the invalid keys."""
    invalid: set[str] = set()
    for error in details:
        keys = {str(error["loc"][0])} if error["loc"] else set(error.get("ctx", {}).get("keys", ()))
        invalid |= keys
        # A default_factory that was not called follows from another error.
        if keys & ignoring or error["type"] == "default_factory_not_called":
            continue
        key, text = describe(error, show=shown)
        first = key.partition(".")[0].partition("[")[0]
        advice = UNSUPPORTED_VALUES.get((first, str(error["input"])))
        if advice and error["type"] == "literal_error":
            found = shown(error["input"])
            text = f"{found}: known from SimpleTuner, not supported here. {advice}"
        if error["type"] == "extra_forbidden":
            text = unknown_key(str(error["loc"][-1]), _fields_at(section, error["loc"][:-1]))
        source.problems.add(source.name_of(first), f"{source.prefix}{key}", text)
    return frozenset(invalid)


def _fields_at(section: type[Section], location: tuple[int | str, ...]) -> Iterable[str]:
    """The keys of the section at a place of another; none if it is no section."""
    found: type[Section] | None = section
    for part in location:
        if found is None or part not in found.model_fields:
            continue  # the number of an entry in a list, or pydantic's name of an alternative
        found = _section_in(found.model_fields[str(part)].annotation)
    return () if found is None else found.model_fields


def _section_in(annotation: object) -> type[Section] | None:
    """The section of a field that holds one, perhaps or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)

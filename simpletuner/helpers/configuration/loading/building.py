"""Values into a section: every problem noted, and what can be made of the section for further checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import JsonValue, ValidationError
from pydantic_core import ErrorDetails

from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.base import PathContext, Section
from simpletuner.helpers.configuration.text.problems import Problems, described
from simpletuner.helpers.contracts import Size

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Validated(Generic[S]):
    """A section, or what could be made of it."""

    section: S | None
    """With defaults in place of what is wrong; None if not even that."""
    invalid_keys: frozenset[str]
    """Keys whose values are not the user's, because those cannot be used."""

    def if_valid(self, *keys: str) -> S | None:
        """The section if these keys in it are as the user gave them."""
        return self.section if not self.invalid_keys & set(keys) else None


@dataclass(frozen=True)
class Source:
    """Where the values of a section come from, for messages and paths."""

    problems: Problems
    name_of: Callable[[str], str]
    """Key -> the file or command line that gave it."""
    context: PathContext
    prefix: str = ""
    """Stands before the keys in messages."""

    def add(self, key: str, text: str) -> None:
        """Note a problem of a key."""
        self.problems.add(self.name_of(key), f"{self.prefix}{key}", text)


def build(
    section: type[S],
    values: Mapping[str, object],
    source: Source,
    *,
    placeholders: Mapping[str, object] | None = None,
) -> Validated[S]:
    """Validate values into a section, noting each problem at its key.

    Args:
        section: The class.
        values: Key -> value.
        source: Where they come from.
        placeholders: Values of required keys that are missing or invalid, so that the rest is checked.
    """
    try:
        return Validated(section.model_validate(values, context=source.context), frozenset())
    except ValidationError as error:
        details = error.errors(include_url=False)
    wrong = _note(details, source, ignoring=frozenset())
    usable = {key: value for key, value in values.items() if key not in wrong}
    missing = {key: value for key, value in (placeholders or {}).items() if key not in usable}
    try:
        return Validated(section.model_validate({**missing, **usable}, context=source.context), wrong)
    except ValidationError as error:
        # What was hidden behind the first problems: a contradiction is looked for only among right values.
        _note(error.errors(include_url=False), source, ignoring=wrong)
        return Validated(None, wrong)


def _note(details: list[ErrorDetails], source: Source, *, ignoring: frozenset[str]) -> frozenset[str]:
    wrong: set[str] = set()
    for error in details:
        about = {str(error["loc"][0])} if error["loc"] else set(error.get("ctx", {}).get("keys", ()))
        wrong |= about
        if about & ignoring or error["type"] == "default_factory_not_called":  # follows from another problem
            continue
        key, text = described(error, show=source.problems.shown)
        first = key.partition(".")[0].partition("[")[0]
        advice = UNSUPPORTED_VALUES.get((first, str(error["input"])))
        if advice and error["type"] == "literal_error":
            found = source.problems.shown(error["input"])
            text = f"{found}: known from SimpleTuner, not supported here. {advice}"
        source.problems.add(source.name_of(first), f"{source.prefix}{key}", text)
    return frozenset(wrong)


def as_json(section: Section) -> dict[str, JsonValue]:
    """The values of a section as json that validates into an equal one."""
    return {key: _plain(value) for key, value in section}


def _plain(value: object) -> JsonValue:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Section):
        return as_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    assert isinstance(value, Path | Size), f"no json form of {type(value).__name__}"
    return str(value)

"""Values into a section: every problem noted, and what can be made of the section for further checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.base import PathContext, Section
from simpletuner.helpers.configuration.text.problems import Problems, described

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Validated(Generic[S]):
    """A section, or what could be made of it."""

    section: S | None
    """With defaults in place of what is wrong; None if not even that."""
    wrong: frozenset[str]
    """Keys whose values are not the user's, because those cannot be used."""

    def right(self, *keys: str) -> S | None:
        """The section if these keys in it are as the user gave them."""
        return self.section if not self.wrong & set(keys) else None


@dataclass(frozen=True)
class Source:
    """Where the values of a section come from, for messages and paths."""

    problems: Problems
    source_of: Callable[[str], str]
    """Key -> the file or command line that gave it."""
    context: PathContext
    prefix: str = ""
    """Stands before the keys in messages."""

    def add(self, key: str, text: str) -> None:
        """Note a problem of a key."""
        self.problems.add(self.source_of(key), f"{self.prefix}{key}", text)


def build(
    section: type[S],
    values: Mapping[str, object],
    place: Source,
    *,
    placeholders: Mapping[str, object] | None = None,
) -> Validated[S]:
    """Validate values into a section, noting each problem at its key.

    Args:
        section: The class.
        values: Key -> value.
        place: Where they come from.
        placeholders: Values of required keys that are missing or invalid, so that the rest is checked.
    """
    try:
        return Validated(section.model_validate(values, context=place.context), frozenset())
    except ValidationError as error:
        details = error.errors(include_url=False)
    wrong = _note(details, place, ignoring=frozenset())
    usable = {key: value for key, value in values.items() if key not in wrong}
    missing = {key: value for key, value in (placeholders or {}).items() if key not in usable}
    try:
        return Validated(section.model_validate({**missing, **usable}, context=place.context), wrong)
    except ValidationError as error:
        # What was hidden behind the first problems: a contradiction is looked for only among right values.
        _note(error.errors(include_url=False), place, ignoring=wrong)
        return Validated(None, wrong)


def _note(details: list[ErrorDetails], place: Source, *, ignoring: frozenset[str]) -> frozenset[str]:
    wrong: set[str] = set()
    for error in details:
        about = {str(error["loc"][0])} if error["loc"] else set(error.get("ctx", {}).get("keys", ()))
        wrong |= about
        if about & ignoring or error["type"] == "default_factory_not_called":  # follows from another problem
            continue
        key, text = described(error, show=place.problems.shown)
        first = key.partition(".")[0].partition("[")[0]
        advice = UNSUPPORTED_VALUES.get((first, str(error["input"])))
        if advice and error["type"] == "literal_error":
            found = place.problems.shown(error["input"])
            text = f"{found}: known from SimpleTuner, not supported here. {advice}"
        place.problems.add(place.source_of(first), f"{place.prefix}{key}", text)
    return frozenset(wrong)

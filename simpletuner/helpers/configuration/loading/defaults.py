"""SimpleTuner's defaults that differ from those here."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.relations import RELATIONS, Context
from simpletuner.helpers.configuration.schema.values import DifferingDefault

CHOICE = "defaults"
"""Key that chooses between the two."""
THEIRS = "simpletuner"


@dataclass(frozen=True)
class Default:
    """A key whose default differs."""

    key: str
    theirs: JsonValue
    relation: str = ""
    """Name in RELATIONS: the runs that it changes; empty for every run."""
    ours: str = ""
    """Our default in words; empty for a value that stands in the configuration."""
    shown: str = ""
    """Theirs in words; empty for the value itself."""


@cache
def differing_defaults() -> tuple[Default, ...]:
    """The table, in the order of the page."""
    path = Path(__file__).with_name("translation.json")
    return tuple(Default(**each) for each in json.loads(path.read_text(encoding="utf-8"))["defaults"])


def their_defaults(given: Container[str], context: Context) -> dict[str, JsonValue]:
    """SimpleTuner's values of the keys that are left out, as far as the run depends on them."""
    return {each.key: each.theirs for each in _left_out(given, context)}


def differences(
    given: Container[str], context: Context, *, values: Mapping[str, Any]
) -> Iterator[DifferingDefault]:
    """The keys that are left out and would have another value in SimpleTuner.

    Args:
        given: Keys that the user set.
        context: All values, and the family.
        values: Key -> value of the run.
    """
    for each in _left_out(given, context):
        if values.get(each.key) != each.theirs:
            ours = each.ours or f"{values.get(each.key)}"
            yield DifferingDefault(each.key, ours=ours, theirs=each.shown or f"{each.theirs}")


def _left_out(given: Container[str], context: Context) -> Iterator[Default]:
    for each in differing_defaults():
        if each.key not in given and (not each.relation or RELATIONS[each.relation](each.key, context)):
            yield each

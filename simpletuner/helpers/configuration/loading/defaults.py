"""SimpleTuner's defaults that differ from those here."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
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
    theirs: JsonValue = None
    families: Mapping[str, JsonValue] = field(default_factory=dict)
    """Family -> theirs, if that depends on it."""
    relation: str = ""
    """Name in RELATIONS: the runs that it changes; empty for every run."""
    ours: str = ""
    """Our default in words; empty for a value that stands in the configuration."""
    shown: str = ""
    """Theirs in words; empty for the value itself."""

    def of(self, context: Context) -> JsonValue:
        """Their value for the model family; None where it is none of SimpleTuner's."""
        if not self.families:
            return self.theirs
        return self.families.get(context.spec.name) if context.spec is not None else None


@cache
def differing_defaults() -> tuple[Default, ...]:
    """The table, in the order of the page."""
    return tuple(Default(**each) for each in _content()["defaults"])


def their_defaults(given: Container[str], context: Context) -> dict[str, JsonValue]:
    """SimpleTuner's values of the keys that are left out, as far as the run depends on them."""
    return {each.key: value for each, value in _left_out(given, context)}


def their_flavour(flavour: str) -> str:
    """Our name of SimpleTuner's flavour, which has another model under some of our names."""
    return their_flavours().get(flavour, flavour)


@dataclass(frozen=True)
class TheirOptimizer:
    """What SimpleTuner does under the name of an optimiser here."""

    ours: str = ""
    """The same optimiser here, if its name is another."""
    learning_rate: float | None = None
    """Used whatever the configuration says; None for the configured one."""
    arguments: Mapping[str, JsonValue] = field(default_factory=dict)
    """Those that differ from the defaults here."""


@cache
def their_optimizers() -> Mapping[str, TheirOptimizer]:
    """Name -> what differs; source: SimpleTuner's table of optimisers."""
    return {name: TheirOptimizer(**each) for name, each in _content()["optimizers"].items()}


def their_flavours() -> Mapping[str, str]:
    """SimpleTuner's flavour -> our name of its model, where ours has another one under that name."""
    flavours: Mapping[str, str] = _content()["flavours"]
    return flavours


def differences(
    given: Container[str], context: Context, *, values: Mapping[str, Any]
) -> Iterator[DifferingDefault]:
    """The keys that are left out and would have another value in SimpleTuner.

    Args:
        given: Keys that the user set.
        context: All values, and the family.
        values: Key -> value of the run.
    """
    flavour = str(values.get("model_flavour"))
    is_read = "model_flavour" in given and "pretrained_model_name_or_path" not in given
    if is_read and their_flavour(flavour) != flavour:
        yield DifferingDefault("model_flavour", ours=flavour, theirs=their_flavour(flavour))
    for each, theirs in _left_out(given, context):
        if values.get(each.key) != theirs:
            ours = each.ours or f"{values.get(each.key)}"
            yield DifferingDefault(each.key, ours=ours, theirs=each.shown or f"{theirs}")


def _left_out(given: Container[str], context: Context) -> Iterator[tuple[Default, JsonValue]]:
    for each in differing_defaults():
        is_read = not each.relation or RELATIONS[each.relation](each.key, context)
        theirs = each.of(context)
        if each.key not in given and is_read and theirs is not None:
            yield each, theirs


@cache
def _content() -> Mapping[str, Any]:
    path = Path(__file__).with_name("translation.json")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content

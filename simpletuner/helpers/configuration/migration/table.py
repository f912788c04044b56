"""What becomes of each key of another program: rows of a json file beside this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import JsonValue

from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Outcome

Program = Literal["kohya", "ai-toolkit", "onetrainer", "diffusers"]
PROGRAMS: tuple[Program, ...] = get_args(Program)


@dataclass(frozen=True, slots=True)
class Value:
    """What one value of a key becomes."""

    ours: JsonValue
    outcome: Outcome = "translated"
    text: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of a key, or of several that share their fate."""

    keys: tuple[str, ...]
    outcome: Outcome
    """The usual one; a reader may find another for a value."""
    ours: str = ""
    """Our key, or our keys in words; empty for none."""
    text: str = ""
    default: JsonValue = None
    """The program's value of a key that is left out. With `ours`, it is written."""
    off: tuple[JsonValue, ...] = ()
    """Values, besides false, 0 and "", that ask for nothing."""
    values: Mapping[str, Value] = field(default_factory=dict)
    """Their value in lower case -> ours; empty for a value that stays as it is."""
    is_computed: bool = False
    """A reader decides, not the table alone."""
    families: tuple[str, ...] = ()
    """Model families that the key is for; empty for all."""

    def is_noop(self, value: JsonValue) -> bool:
        """Whether this value equals the key's absence."""
        return is_off(value) or value in self.off


@dataclass(frozen=True, slots=True)
class Table:
    """A program's keys and its other facts."""

    program: str
    """Its name for people."""
    groups: Mapping[str, tuple[Row, ...]]
    """Place in the program's files -> rows."""
    facts: Mapping[str, Any]
    """The rest of the json: families, target layers, presets."""

    def rows(self, group: str) -> dict[str, Row]:
        """Key -> row of one place."""
        return {key: row for row in self.groups[group] for key in row.keys}


@cache
def load_table(program: Program) -> Table:
    """The table of a program."""
    path = Path(__file__).with_name(f"{program.replace('-', '_')}.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    groups = {place: tuple(map(_row, rows)) for place, rows in content["keys"].items()}
    return Table(program=content["program"], groups=groups, facts=content)


_CONVERTED = ("keys", "values", "off", "computed", "families")


def _row(entry: Mapping[str, Any]) -> Row:
    values = {theirs: _value(ours) for theirs, ours in entry.get("values", {}).items()}
    others = {key: value for key, value in entry.items() if key not in _CONVERTED}
    return Row(
        keys=tuple(entry["keys"]),
        values=values,
        off=tuple(entry.get("off", ())),
        is_computed=entry.get("computed", False),
        families=tuple(entry.get("families", ())),
        **others,
    )


def _value(entry: JsonValue) -> Value:
    if isinstance(entry, dict):
        return Value(**entry)  # type: ignore[arg-type]  # the tables are part of the package, and tested
    return Value(entry)

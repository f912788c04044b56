"""SimpleTuner's keys without support here, and advice for each; the table is unsupported_keys.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.problems import unknown_key

Table = Literal["config.json", "dataset", "lycoris", "apply_preset"]


@dataclass(frozen=True, slots=True)
class UnsupportedKey:
    """A key that SimpleTuner reads and this program does not."""

    advice: str
    """What to do, as a sentence."""
    harmless_values: tuple[str, ...] = ()
    """Values, in lower case, that equal the behaviour without the key."""

    def problem(self, value: object) -> str | None:
        """The error message for a value; None if the key may stay."""
        if is_off(value) or str(value).strip().lower() in self.harmless_values:
            return None
        return f"known from SimpleTuner, not supported here. {self.advice}"


def key_problem(table: Table, key: str, value: object, *, known: Iterable[str]) -> str | None:
    """The error message for a key that is not among the known ones; None if the key may stay."""
    unsupported = unsupported_keys(table).get(key)
    return unknown_key(key, known) if unsupported is None else unsupported.problem(value)


@cache
def unsupported_keys(table: Table) -> Mapping[str, UnsupportedKey]:
    """Key -> advice. The file is read only for a configuration with an unknown key."""
    path = Path(__file__).with_suffix(".json")
    groups = json.loads(path.read_text(encoding="utf-8"))[table]
    return {
        key: UnsupportedKey(group["advice"], tuple(group.get("harmless_values", ())))
        for group in groups
        for key in group["keys"]
    }

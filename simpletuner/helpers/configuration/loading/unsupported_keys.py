"""SimpleTuner's keys without support here, and advice for each; the table is unsupported_keys.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from simpletuner.helpers.configuration.schema.values import is_off

Table = Literal["config.json", "dataset", "lycoris", "apply_preset"]


@dataclass(frozen=True, slots=True)
class UnsupportedKey:
    """A key that SimpleTuner reads and this program does not."""

    advice: str
    """What to do, as a sentence."""

    def problem(self, value: object) -> str | None:
        """The error message for a value; None if the key may stay."""
        return None if is_off(value) else f"known from SimpleTuner, not supported here. {self.advice}"


@cache
def unsupported_keys(table: Table) -> Mapping[str, UnsupportedKey]:
    """Key -> advice. The file is read only for a configuration with an unknown key."""
    path = Path(__file__).with_suffix(".json")
    groups = json.loads(path.read_text(encoding="utf-8"))[table]
    return {key: UnsupportedKey(group["advice"]) for group in groups for key in group["keys"]}

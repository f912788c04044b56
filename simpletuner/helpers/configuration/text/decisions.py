"""What became of each key of a file that was written for another program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

Outcome = Literal["same", "translated", "approximate", "no effect", "not translated"]


@dataclass(frozen=True, slots=True)
class Decision:
    """One key of a foreign file, and its setting here."""

    key: str
    """The key as written, with its place in the file: "process[0].train.lr"."""
    value: JsonValue
    """The value as written."""
    outcome: Outcome
    """same: key and value stand here too; approximate: the text states the difference."""
    ours: str
    """The setting here, "optimizer: adamw"; empty for no effect and not translated."""
    text: str
    """A sentence that says why, or what to do; may be empty for same."""

"""The configuration that a foreign file becomes, and the decisions that lead to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.arithmetic import Length
from simpletuner.helpers.configuration.migration.table import Row
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision, Outcome
from simpletuner.helpers.configuration.text.problems import shown
from simpletuner.helpers.errors import ConfigError

HIDDEN = "***"
SECRET = re.compile(r"(api_key|access_key|secret|password|(hf|hub|huggingface|auth)_token)", re.IGNORECASE)
UNKNOWN = "Not known here, so the run goes without it."
UNUSED = "It has no meaning beside the other settings, or is not read here."


@dataclass(slots=True)
class Draft:
    """A configuration in the making."""

    program: str
    """Name of the program that the file was written for."""
    config: dict[str, JsonValue] = field(default_factory=dict)
    """config.json, without the names of the other files."""
    datasets: list[dict[str, JsonValue]] = field(default_factory=list)
    lycoris: dict[str, JsonValue] | None = None
    prompts: dict[str, JsonValue] = field(default_factory=dict)
    """Name -> prompt of the validation images, or object of it and its reference images; a single one stands
    in config.json."""
    decisions: list[Decision] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)
    """Sentences: what the user must still do."""
    length: Length | None = None
    """Steps and samples of the run; None if the images are not at hand."""

    def set_length(self, length: Length) -> None:
        """Note how long the run is in the other program."""
        self.length = length

    def set_lycoris(self, lycoris: dict[str, JsonValue]) -> None:
        """Set the content of the lycoris json."""
        self.lycoris = lycoris

    def change(self, key: str, value: JsonValue, text: str) -> None:
        """Set one of our keys to another value than was decided, and say why in its decision."""
        if self.config.get(key) == value:
            return
        self.config[key] = value
        ours = f"{key}: {shown(value)}"
        self.decisions = [
            replace(each, outcome="approximate", ours=ours, text=text)
            if each.ours.startswith(f"{key}: ")
            else each
            for each in self.decisions
        ]

    def withdraw(self, key: str, text: str, *, outcome: Outcome = "no effect") -> None:
        """Take one of our keys back, and the decision with it."""
        if key not in self.config:
            return
        del self.config[key]
        self.decisions = [
            replace(each, outcome=outcome, ours="", text=text) if each.ours.startswith(f"{key}: ") else each
            for each in self.decisions
        ]


class Settings:
    """The keys of one place of a foreign file, each of which is decided once.

    Keys that no reader decides are decided by the table's rows, or as unknown.
    """

    def __init__(
        self,
        values: Mapping[str, JsonValue],
        rows: Mapping[str, Row],
        draft: Draft,
        *,
        place: str = "",
        family: str = "",
    ) -> None:
        self._others = {key for key, row in rows.items() if row.families and family not in row.families}
        rows = {key: row for key, row in rows.items() if key not in self._others}
        self.values = {key: value for key, value in values.items() if value is not None}
        self.rows, self.draft, self.place = rows, draft, place
        self._decided: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file gives the key."""
        return key in self.values

    def value(self, key: str) -> JsonValue:
        """The value of a key, or the program's default."""
        if key in self.values:
            return self.values[key]
        return self.rows[key].default if key in self.rows else None

    def text(self, key: str) -> str:
        """The value as a text; empty for none."""
        value = self.value(key)
        return "" if value is None else str(value).strip()

    def flag(self, key: str) -> bool:
        """Whether the value switches something on."""
        return not is_off(self.value(key))

    def number(self, key: str, default: float = 0.0) -> float:
        """The value as a number.

        Raises:
            ConfigError: It is none.
        """
        value = self.value(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            return default
        try:
            return float(value)  # type: ignore[arg-type]  # a list raises TypeError
        except (TypeError, ValueError):
            raise self.error(key, "must be a number.") from None

    def whole(self, key: str, default: int = 0) -> int:
        """The value as a whole number.

        Raises:
            ConfigError: It is none.
        """
        number = self.number(key, float(default))
        if number != number or abs(number) >= 1e15 or number != int(number):
            raise self.error(key, "must be a whole number.")
        return int(number)

    def items(self, key: str) -> list[JsonValue]:
        """The value as a list; a single value is a list of one."""
        value = self.value(key)
        if isinstance(value, list):
            return list(value)
        return [] if value is None or value == "" else [value]

    def error(self, key: str, text: str) -> ConfigError:
        """An error about the value of a key."""
        found = HIDDEN if SECRET.search(key) else shown(self.value(key))
        return ConfigError(f"{self.place}{key}: {found}: {text}")

    def decide(self, key: str, outcome: Outcome, *, ours: str = "", text: str = "") -> None:
        """Note what became of a key; a key that is not in the file is noted with the program's default."""
        if key in self._decided:
            return
        self._decided.add(key)
        given = key in self.values
        if not given and self.value(key) is None and not text:
            return
        value = HIDDEN if given and SECRET.search(key) else self.value(key)
        note = "" if given else "Not in the file: the program's default."
        whole = " ".join(filter(None, (note, text)))
        place = f"{self.place}{key}"
        self.draft.decisions.append(
            Decision(place, value, outcome, ours if outcome in _WITH_OURS else "", whole)
        )

    def put(
        self,
        key: str,
        ours: str,
        value: JsonValue,
        *,
        outcome: Outcome | None = None,
        text: str | None = None,
        into: dict[str, JsonValue] | None = None,
    ) -> None:
        """Write one of our keys, and note the decision; outcome and text are by default the table's."""
        target = self.draft.config if into is None else into
        target[ours] = value
        row = self.rows.get(key)
        if outcome is None:
            outcome = row.outcome if row is not None else "translated"
        if outcome in ("same", "translated"):
            outcome = "same" if ours == key and value == self.value(key) else "translated"
        note = text if text is not None else row.text if row is not None else ""
        self.decide(key, outcome, ours=f"{ours}: {shown(value)}", text=note)

    def skip(self, key: str, text: str | None = None, *, outcome: Outcome = "not translated") -> None:
        """Note that a key has no setting here; the text is by default the table's."""
        row = self.rows.get(key)
        if not self.has(key) and row is not None and row.is_noop(row.default):
            return
        if row is not None and row.is_noop(self.value(key)):
            self.decide(key, "no effect", text="Off, as here.")
        else:
            self.decide(
                key, outcome, text=text if text is not None else row.text if row is not None else UNKNOWN
            )

    def finish(self, into: dict[str, JsonValue] | None = None) -> None:
        """Decide the keys that are left, by the table."""
        for key, row in self.rows.items():
            if key not in self._decided and (key in self.values or (row.ours and row.default is not None)):
                self._by_row(key, row, into)
        for key in self.values:
            if key in self._others:
                self.decide(key, "no effect", text="Another model family's key.")
            self.decide(key, "not translated", text=UNKNOWN)

    def _by_row(self, key: str, row: Row, into: dict[str, JsonValue] | None) -> None:
        if row.is_computed:
            if key in self.values:
                self.skip(key, UNUSED)
        elif row.outcome in ("no effect", "not translated"):
            self.skip(key, outcome=row.outcome)
        elif row.values:
            self._by_value(key, row, into)
        else:
            self.put(key, row.ours, self.value(key), into=into)

    def _by_value(self, key: str, row: Row, into: dict[str, JsonValue] | None) -> None:
        found = row.values.get(self.text(key).lower())
        if found is None:
            known = ", ".join(row.values)
            self.decide(
                key, "not translated", text=f"Not known here, which knows {known}. {row.text}".strip()
            )
        elif found.ours is None:
            self.decide(key, found.outcome, text=found.text or row.text)
        else:
            self.put(key, row.ours, found.ours, outcome=found.outcome, text=found.text or row.text, into=into)


_WITH_OURS: tuple[Outcome, ...] = ("same", "translated", "approximate")

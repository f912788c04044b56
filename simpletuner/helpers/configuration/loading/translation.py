"""SimpleTuner's spellings of what exists here, and its keys without effect; the table is translation.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from pydantic import JsonValue

from simpletuner.helpers.choices.optimizers import OPTIMIZERS, Optimizer
from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.configuration.loading.relations import RELATIONS, Context
from simpletuner.helpers.configuration.loading.unsupported_keys import Table, unsupported_keys
from simpletuner.helpers.configuration.schema.datasets import SMALLEST_EDGE_PX
from simpletuner.helpers.configuration.schema.values import (
    hub_repository,
    is_off,
    optimizer_arguments,
    sizes,
)
from simpletuner.helpers.configuration.text.decisions import Decision, Outcome
from simpletuner.helpers.configuration.text.problems import shown, unknown_key
from simpletuner.helpers.contracts import Size

File = Literal["config.json", "dataset", "huggingface", "parquet", "text_embeds", "lycoris", "apply_preset"]
"""Kinds of files, and of entries and objects within them."""
_ONE_MEGAPIXEL = 1024
OFF = "Off, as here."
"""What becomes of a key that is not supported here, at a value that asks for nothing."""


@dataclass(frozen=True)
class NoEffect:
    """Keys without effect, if every condition that is given holds."""

    keys: tuple[str, ...]
    """Names; one that ends with * stands for all that begin so."""
    text: str
    values: tuple[str, ...] = ()
    """In lower case; empty for any."""
    without: tuple[str, ...] = ()
    """Keys that must be off or left out."""
    relation: str = ""
    """Name in RELATIONS."""

    def holds(self, key: str, value: JsonValue, context: Context) -> bool:
        """Whether this value of the key has no effect."""
        return (
            (not self.values or is_off(value) or str(value).strip().lower() in self.values)
            and not any(context.is_on(switch) for switch in self.without)
            and (not self.relation or RELATIONS[self.relation](key, context))
        )


@dataclass(frozen=True)
class Renamed:
    """Values with another name here."""

    keys: tuple[str, ...]
    values: Mapping[str, str]
    """Theirs, in lower case -> ours."""
    text: str
    to: str = ""
    """Our key; empty for the same."""
    arguments: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict)
    """Our key -> entries that count where the file gives no others."""
    outcome: Outcome = "translated"


@dataclass(frozen=True)
class Tables:
    """The entries for one kind of file."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Another name of a key -> its name."""
    renamed: tuple[Renamed, ...] = ()
    functions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Key -> (name in FUNCTIONS, text)."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Key -> entry of optimizer_config."""
    argument_text: str = ""
    alias_text: str = ""
    no_effect: tuple[NoEffect, ...] = ()
    owned: tuple[NoEffect, ...] = ()
    """Keys that exist here and have no effect under a condition."""

    def without_effect(self, key: str) -> Iterator[NoEffect]:
        """The entries of a key that does not exist here; those of its own name first."""
        patterns = [entry for entry in self.no_effect if any(_matches(name, key) for name in entry.keys)]
        yield from (entry for entry in self.no_effect if key in entry.keys)
        yield from patterns


@dataclass(frozen=True)
class Translation:
    """Values in our names, and what became of the others."""

    values: dict[str, JsonValue]
    decisions: tuple[Decision, ...]
    """not translated: the text is the problem. Keys that stay as they are have none."""


def _matches(pattern: str, key: str) -> bool:
    return pattern.endswith("*") and key.startswith(pattern[:-1])


@cache
def tables(file: File) -> Tables:
    """The entries for a kind of file."""
    path = Path(__file__).with_suffix(".json")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))[file]

    def effects(section: str) -> tuple[NoEffect, ...]:
        return tuple(
            NoEffect(
                keys=tuple(entry["keys"]),
                text=entry["text"],
                values=tuple(entry.get("values", ())),
                without=tuple(entry.get("without", ())),
                relation=entry.get("relation", ""),
            )
            for entry in content.get(section, ())
        )

    renamed = tuple(
        Renamed(
            keys=tuple(entry["keys"]),
            values=entry["values"],
            text=entry["text"],
            to=entry.get("to", ""),
            arguments=entry.get("with", {}),
            outcome=entry.get("outcome", "translated"),
        )
        for entry in content.get("values", ())
    )
    functions = {
        key: (entry["function"], entry["text"])
        for entry in content.get("functions", ())
        for key in entry["keys"]
    }
    aliases, arguments = content.get("aliases", ()), content.get("optimizer_config", ())
    return Tables(
        aliases={old: new for entry in aliases for old, new in entry["keys"].items()},
        alias_text=" ".join(entry["text"] for entry in aliases),
        renamed=renamed,
        functions=functions,
        arguments={key: name for entry in arguments for key, name in entry["keys"].items()},
        argument_text=" ".join(entry["text"] for entry in arguments),
        no_effect=effects("no_effect"),
        owned=effects("owned"),
    )


def rename_keys(file: File, items: Iterable[tuple[str, JsonValue]]) -> Translation:
    """The values of one file, or of the command line, under the names of keys here."""
    table = tables(file)
    values: dict[str, JsonValue] = {}
    first: dict[str, tuple[str, JsonValue]] = {}
    decisions: list[Decision] = []
    for spelling, given in items:
        key = spelling.removeprefix("--")
        name, value, text = _named(table, key, given)
        if name in values and _lowered(values[name]) != _lowered(value):
            decisions.append(_contradiction(table, name, given=(first[name], (spelling, given))))
            continue
        if name != key:
            decisions.append(Decision(key, given, "translated", f"{name}: {shown(value)}", text))
        values.setdefault(name, value)
        first.setdefault(name, (spelling, given))
    return Translation(values, tuple(decisions))


def _contradiction(table: Tables, name: str, *, given: tuple[tuple[str, JsonValue], ...]) -> Decision:
    """Of a key that is given under two names with different values."""
    (one, one_value), (other, other_value) = given
    for spelling, value, against in ((other, other_value, one_value), (one, one_value, other_value)):
        key = spelling.removeprefix("--")
        ours, meant, _ = _named(table, key, value)
        if ours != key and key not in table.aliases:
            text = f"{shown(value)}: means {name} {shown(meant)}, but {name} is {shown(against)}. Keep one."
            return Decision(key, value, "not translated", "", text)
    return Decision(
        other, other_value, "not translated", "", f"given twice, as {one} and as {other}. Keep one."
    )


def _named(table: Tables, key: str, value: JsonValue) -> tuple[str, JsonValue, str]:
    """(our key, value, text) of a key with another name, or whose value has another key here."""
    if key in table.aliases:
        return table.aliases[key], value, table.alias_text
    for entry in table.renamed:
        if entry.to and key in entry.keys and _lowered(value) in entry.values:
            return entry.to, entry.values[_lowered(value)], entry.text
    return key, value, ""


def _lowered(value: JsonValue) -> str:
    return str(value).strip().lower()


def translate_values(
    file: File,
    values: Mapping[str, JsonValue],
    *,
    owned: Container[str],
    known: Iterable[str],
    context: Context,
    takes_empty: Callable[[str], bool],
) -> Translation:
    """The values of keys that exist here, in our spelling, and what became of every other key.

    Args:
        file: The kind of file.
        values: By the names of `rename_keys`, without null.
        owned: Keys that exist here.
        known: Names for the hint at a misspelt key.
        context: All values, and the family.
        takes_empty: Whether an empty text is a value of a key; else the key counts as left out.
    """
    table = tables(file)
    ours: dict[str, JsonValue] = {}
    decisions: list[Decision] = []
    for key, value in values.items():
        if key in table.arguments:
            continue
        if key not in owned:
            decisions.append(_of_unowned(file, key, value, known=known, context=context))
            continue
        idle = (each for each in table.owned if key in each.keys and each.holds(key, value, context))
        entry = next(idle, None)
        if entry is not None:
            decisions.append(Decision(key, value, "no effect", "", entry.text))
        elif value == "" and not takes_empty(key):
            decisions.append(Decision(key, value, "no effect", "", "Empty, so as if it were left out."))
        else:
            ours[key], decision = _respelt(table, key, value, context=context)
            decisions += [decision] if decision is not None else []
    decisions += _gather_arguments(table, values, ours)
    return Translation(ours, tuple(decisions))


def refusal(file: File, key: str, value: JsonValue, *, known: Iterable[str]) -> str | None:
    """Why a key that does not exist here is refused; None if it has no effect."""
    decision = _of_unowned(file, key, value, known=known, context=Context({key: value}))
    return decision.text if decision.outcome == "not translated" else None


def _of_unowned(
    file: File, key: str, value: JsonValue, *, known: Iterable[str], context: Context
) -> Decision:
    """What becomes of a key that does not exist here."""
    unsupported = unsupported_keys(_table_of(file)).get(key)
    switches: list[str] = []
    for entry in tables(file).without_effect(key):
        if entry.holds(key, value, context):
            return Decision(key, value, "no effect", "", entry.text)
        switches += [switch for switch in entry.without if context.is_on(switch) and switch != key]
    if unsupported is not None:
        problem = unsupported.problem(value)
        return Decision(key, value, "no effect" if problem is None else "not translated", "", problem or OFF)
    if key.startswith("_"):
        return Decision(key, value, "no effect", "", "A remark.")
    if switches:
        text = f"belongs to {switches[0]}, which is not supported here. Remove both."
        return Decision(key, value, "not translated", "", text)
    return Decision(key, value, "not translated", "", unknown_key(key, known))


def _table_of(file: File) -> Table:
    if file == "text_embeds" or file == "huggingface" or file == "parquet":
        return "dataset"
    return file


def _respelt(
    table: Tables, key: str, value: JsonValue, *, context: Context
) -> tuple[JsonValue, Decision | None]:
    """A value in our spelling, and the decision if it is another one."""
    if key in table.functions:
        name, text = table.functions[key]
        outcome: Outcome = "translated"
        respelt = FUNCTIONS[name](value, context)
    else:
        respelt, outcome, text = value, "translated", ""
    for entry in table.renamed:
        if key in entry.keys and not entry.to and isinstance(value, str) and _lowered(value) in entry.values:
            respelt, outcome, text = entry.values[_lowered(value)], entry.outcome, entry.text
    if respelt == value:
        return value, None
    return respelt, Decision(key, value, outcome, f"{key}: {shown(respelt)}", text)


def _gather_arguments(
    table: Tables, values: Mapping[str, JsonValue], ours: dict[str, JsonValue]
) -> Iterator[Decision]:
    """Put single arguments of the optimiser, and those of its other name, into optimizer_config."""
    key = "optimizer_config"
    parts = {name: value for name, value in values.items() if name in table.arguments}
    entries = [each for each in table.renamed if _lowered(values.get("optimizer")) in each.values]
    defaults = {name: value for each in entries for name, value in each.arguments.get(key, {}).items()}
    if not parts and not defaults:
        return
    record = OPTIMIZERS.named(ours.get("optimizer", "adamw")) or OPTIMIZERS["adamw"]
    for name in [each for each in parts if not _takes(record, table.arguments[each])]:
        text = f"The optimiser {record.name} has no such argument."
        yield Decision(name, parts.pop(name), "no effect", "", text)

    def read(value: object) -> dict[str, Any]:
        return dict(optimizer_arguments(value, betas=record.betas if "betas" in record.arguments else ()))

    try:
        arguments = read(ours.get(key))
        given = {name: read({table.arguments[name]: value}) for name, value in parts.items()}
    except ValueError as error:
        if not parts:
            return  # the section says what is wrong with optimizer_config
        first = next(iter(parts))
        yield Decision(first, parts[first], "not translated", "", f"cannot be put into {key}: {error}")
        return
    merged = read({table.arguments[name]: value for name, value in parts.items()})
    for name, value in parts.items():
        (argument,) = given[name]
        found = arguments.get(argument, merged[argument])
        if found != merged[argument]:
            text = f"is {table.arguments[name]} of {key}, which says otherwise. Keep one."
            yield Decision(name, value, "not translated", "", text)
        else:
            setting = f"{key}: {table.arguments[name]}={value}"
            yield Decision(name, value, "translated", setting, table.argument_text)
    whole = read(defaults) | merged | arguments
    if whole or key in ours:
        ours[key] = {name: _plain(value) for name, value in whole.items()}


def _takes(record: Optimizer, argument: str) -> bool:
    """Whether an optimiser has an argument of Adam; beta1 and beta2 are parts of betas."""
    return ("betas" if argument in ("beta1", "beta2") else argument) in record.arguments


def _plain(value: object) -> JsonValue:
    return list(value) if isinstance(value, tuple) else cast("JsonValue", value)


def _installed_trackers(value: JsonValue, _context: Context) -> JsonValue:
    """Every tracker that is installed for "all"; other values as they are."""
    if _lowered(value) != "all":
        return value
    return [
        name
        for name, record in TRACKERS.items()
        if not record.package or find_spec(record.package) is not None
    ]


def _owner_and_name(value: JsonValue, _context: Context) -> JsonValue:
    """owner/name of the address of a repository; other values as they are."""
    if not isinstance(value, str) or "://" not in value:
        return value
    try:
        return cast("JsonValue", hub_repository(value))
    except ValueError:
        return value  # the section says what is wrong with it


def _made_sizes(value: JsonValue, context: Context) -> JsonValue:
    """Sizes of validation images as SimpleTuner makes them; others as they are.

    A small number is in megapixels there, 1 for 1024 pixels. The pipelines of transformers round a size down
    to what the model takes.
    """
    number = context.number("validation_resolution")
    if number is not None and 1 <= number < SMALLEST_EDGE_PX:
        return _ONE_MEGAPIXEL if int(number) == 1 else int(number) * 1000 // 8 * 8
    whole: JsonValue = value if number is None or not number.is_integer() else int(number)
    plain = value if _lowered(value) == _lowered(whole) else whole
    try:
        found = sizes(whole)
    except ValueError:
        return value
    if context.spec is None or context.spec.denoiser_name == "unet":
        return plain
    step = context.spec.minimum_alignment
    made = [Size(height=each.height // step * step, width=each.width // step * step) for each in found]
    fits = list(found) == made or not all(each.height and each.width for each in made)
    return plain if fits else ",".join(map(str, made))


FUNCTIONS: Mapping[str, Callable[[JsonValue, Context], JsonValue]] = MappingProxyType(
    {
        "installed trackers": _installed_trackers,
        "owner and name": _owner_and_name,
        "sizes as made": _made_sizes,
    }
)

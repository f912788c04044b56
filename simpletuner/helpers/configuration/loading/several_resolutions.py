"""A list as the resolution of a dataset: one dataset for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.loading.conditioning import Conditions
from simpletuner.helpers.configuration.text.decisions import Decision

KEY = "resolution"
_TEXT = "An epoch draws every image at each size."


def at_each_resolution(
    values: Mapping[str, JsonValue], source: Source, *, index: int, first_with: dict[str, int]
) -> tuple[list[dict[str, JsonValue]], list[Decision]]:
    """The entries that an entry of images stands for, and a line on them; itself without a list.

    Args:
        values: Of the entry.
        source: Where it stands.
        index: Its place in the file.
        first_with: Id -> place of the first entry with it; ids that are made are added.
    """
    sizes, identity = values.get(KEY), values.get("id")
    if not isinstance(sizes, list):
        return [dict(values)], []
    if not sizes:
        source.reject(KEY, sizes, "must not be empty. Give one resolution or several.")
        return [], []
    if len(sizes) == 1 or not isinstance(identity, str):
        return [{**values, KEY: sizes[0]}], []
    names = [f"{identity}-{_shown(size)}" for size in sizes]
    for name in names:
        if name in first_with:
            source.reject(KEY, sizes, f"makes a dataset {name}, and [{first_with[name]}] makes one too.")
        first_with[name] = index
    line = Decision(f"{source.prefix}{KEY}", sizes, "translated", f"datasets {', '.join(names)}", _TEXT)
    return [{**values, "id": name, KEY: size} for name, size in zip(names, sizes, strict=True)], [line]


def with_copies(conditions: Conditions, copies: Mapping[str, Sequence[str]]) -> Conditions:
    """The conditions in which the datasets of an entry have what it has; its id -> theirs."""
    given = dict(conditions.given)
    for identity, own in copies.items():
        given |= {each: given[identity] for each in own if identity in given}
    return replace(conditions, given=given, names=conditions.names.union(*copies.values()))


def _shown(size: JsonValue) -> str:
    return f"{size:g}" if isinstance(size, float) else str(size)

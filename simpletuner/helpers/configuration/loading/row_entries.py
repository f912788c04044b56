"""Objects in which SimpleTuner's entries of rows keep their keys: huggingface, parquet and filter_func."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Final

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.relations import Context
from simpletuner.helpers.configuration.loading.translation import File, translate_values
from simpletuner.helpers.configuration.schema.row_keys import HUB, CaptionTable, RowCaptionKeys, RowKeys
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.problems import shown

_HUB: Final = "huggingface"
_TABLE: Final = "parquet"
_FILTER, _ROWS = "filter_func", "row_filter"
_LIMITS = {f"{kind}_{edge}": (edge, kind) for kind in ("min", "max") for edge in ("width", "height")}
_DOWNLOADS = "Downloads lie in the hub's cache; the environment variable HF_HOME moves it."
_HOISTED = "Its keys stand in the entry itself."
_NO_OBJECT = "must be an object, {...}."


def unnested(values: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], list[Decision]]:
    """The values of an entry with those of its objects in our places, and what became of each of them."""
    found = dict(values)
    decisions: list[Decision] = []
    for key in (_HUB, _TABLE):
        if key in found and not isinstance(found[key], Mapping):
            value = found.pop(key)
            decisions += [] if is_off(value) else [_refused(key, value, f"{shown(value)}: {_NO_OBJECT}")]
    if isinstance(table := found.get(_TABLE), dict):
        found[_TABLE] = dict(_translated(_TABLE, table, owned=CaptionTable.model_fields, decisions=decisions))
    if found.get("type") == HUB and "cache_dir" in found:
        decisions.append(Decision("cache_dir", found.pop("cache_dir"), "no effect", "", _DOWNLOADS))
    hub = found.pop(_HUB, None)
    columns: Mapping[str, JsonValue] = hub if isinstance(hub, dict) else {}
    owned = {*RowKeys.model_fields, *RowCaptionKeys.model_fields, _FILTER} - {"table_file", _TABLE}
    for key, value in _translated(_HUB, columns, owned=owned, decisions=decisions).items():
        if key in found and found[key] != value:
            text = f"{shown(value)}, but {key} of the entry is {shown(found[key])}. Keep one."
            decisions.append(_refused(f"{_HUB}.{key}", value, text))
            continue
        found[key] = value
        if key != _FILTER:
            ours = f"{key}: {shown(value)}"
            decisions.append(Decision(f"{_HUB}.{key}", value, "translated", ours, _HOISTED))
    if _FILTER in found:
        _put_filter(found, columns, decisions)
    return found, decisions


def _put_filter(
    found: dict[str, JsonValue], columns: Mapping[str, JsonValue], decisions: list[Decision]
) -> None:
    """Put the conditions of filter_func into row_filter."""
    given = found.pop(_FILTER)
    if is_off(given):
        return
    conditions = list(_conditions(given, columns)) if isinstance(given, dict) else None
    ours: dict[str, JsonValue] = {key: value for key, value in conditions or () if key is not None}
    if conditions is None:
        decisions.append(_refused(_FILTER, given, f"{shown(given)}: {_NO_OBJECT}"))
    elif len(ours) < len(conditions):
        text = f"{shown(given)}: cannot be translated. Set {_ROWS}, with a condition for each column."
        decisions.append(_refused(_FILTER, given, text))
    else:
        found[_ROWS] = ours
        decisions.append(Decision(_FILTER, given, "translated", f"{_ROWS}: {shown(ours)}", ""))


def _conditions(
    given: Mapping[str, JsonValue], columns: Mapping[str, JsonValue]
) -> Iterator[tuple[str | None, JsonValue]]:
    """(column, condition) of each key of filter_func; (None, its value) for one that means nothing here."""
    limits: dict[str, dict[str, JsonValue]] = {}
    for key, value in given.items():
        if key in _LIMITS:
            edge, kind = _LIMITS[key]
            limits.setdefault(str(columns.get(f"{edge}_column") or edge), {})[kind] = value
        elif key == "quality_thresholds" and isinstance(value, dict):
            quality = columns.get("quality_column") or given.get("quality_column") or "quality_assessment"
            yield from ((f"{quality}.{name}", {"min": least}) for name, least in value.items())
        elif key == "collection":
            yield key, value
        elif key != "quality_column":
            yield None, value
    yield from limits.items()


def _translated(
    file: File, values: Mapping[str, JsonValue], *, owned: Collection[str], decisions: list[Decision]
) -> Mapping[str, JsonValue]:
    """The values of the keys that exist here; adds what became of the others, with their place."""
    given = {key: value for key, value in values.items() if value is not None}
    result = translate_values(
        file, given, owned=owned, known=owned, context=Context(given), takes_empty=lambda _key: False
    )
    decisions += [replace(each, key=f"{file}.{each.key}") for each in result.decisions]
    return result.values


def _refused(key: str, value: JsonValue, text: str) -> Decision:
    return Decision(key, value, "not translated", "", text)

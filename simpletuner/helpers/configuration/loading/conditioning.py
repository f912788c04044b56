"""Entries of the dataset json whose images condition those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source, build
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.problems import nearest

TYPE, OWNER, SERVANTS = "conditioning_type", "source_dataset_id", "conditioning_data"
REMEDY = 'Remove the entry, or set "disabled": true in it.'
_NO_EFFECT = "Of the images; a mask gets the resize and the crop of its image."


@dataclass(frozen=True)
class Conditions:
    """Which entries condition which, by id."""

    given: Mapping[str, tuple[str, ...]]
    """Entry of images -> those that condition it, as either of them says."""
    names: frozenset[str]
    """Every id of the file."""
    disabled: frozenset[str]
    kinds: frozenset[str]
    """conditioning_type of the entries that are not disabled; "" if one is named and none gives it."""

    def owners(self, identity: str) -> tuple[str, ...]:
        """The entries that this one conditions."""
        return tuple(owner for owner, ids in self.given.items() if identity in ids)


def conditions_of(entries: Sequence[JsonValue]) -> Conditions:
    """Read which entries condition which, from all entries of a dataset json."""
    given: dict[str, list[str]] = {}
    names: set[str] = set()
    disabled: set[str] = set()
    kinds: set[str] = set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            continue
        values = {key.removeprefix("--"): value for key, value in entry.items()}
        identity = str(values.get("id", f"[{index}]"))
        names.add(identity)
        if not is_off(values.get("disabled")):
            disabled.add(identity)
        elif not is_off(values.get(TYPE)):
            kinds.add(str(values[TYPE]))
        if not is_conditioning(values):
            given.setdefault(identity, []).extend(_ids(values.get(SERVANTS)))
        for owner in _ids(values.get(OWNER)):
            given.setdefault(owner, []).append(identity)
    unique = {owner: tuple(dict.fromkeys(ids)) for owner, ids in given.items() if ids}
    if unique and not kinds:
        kinds.add("")
    return Conditions(unique, frozenset(names), frozenset(disabled), frozenset(kinds))


def is_conditioning(values: Mapping[str, JsonValue]) -> bool:
    """Whether an entry says of itself that its images condition others."""
    is_named = values.get("dataset_type") == "conditioning"
    return is_named or not is_off(values.get(TYPE)) or not is_off(values.get(OWNER))


def read_conditioning(
    values: Mapping[str, JsonValue], source: Source, *, conditions: Conditions
) -> tuple[ConditioningConfig | None, list[Decision]]:
    """Check an entry whose images condition others, by the names of keys here."""
    if is_off(values.get(TYPE)):
        source.add(TYPE, f'required, but missing: "mask" or "segmentation". Else: {REMEDY}')
        return None, []
    if advice := UNSUPPORTED_VALUES.get((TYPE, str(values[TYPE]))):
        source.reject(TYPE, values[TYPE], f"known from SimpleTuner, not supported here. {advice}")
        return None, []
    if not is_off(values.get(SERVANTS)):
        source.reject(SERVANTS, values[SERVANTS], "this entry holds masks, which have none. Remove it.")
    own = ConditioningConfig.model_fields
    unread = DatasetConfig.model_fields.keys() - own.keys()
    decisions = [
        Decision(f"{source.prefix}{key}", value, "no effect", "", _NO_EFFECT)
        for key, value in values.items()
        if key in unread and key != SERVANTS
    ]
    kept = {key: value for key, value in values.items() if key not in unread and key != OWNER}
    built = build(ConditioningConfig, kept, source)
    identity = str(values.get("id"))
    if "id" in values and not conditions.owners(identity):
        text = f'no entry names it. Add "{SERVANTS}": "{identity}" to the entry of its images, or remove it.'
        source.reject("id", identity, text)
    return built.section if not built.invalid_keys else None, decisions


def paired(
    datasets: Sequence[DatasetConfig],
    masks: Sequence[ConditioningConfig],
    *,
    conditions: Conditions,
    source: Source,
) -> tuple[tuple[DatasetConfig, ...], tuple[ConditioningConfig, ...]]:
    """The datasets with the ids of what conditions them, and the entries that do; notes problems."""
    known = {each.id: each for each in masks}
    complete: list[DatasetConfig] = []
    for dataset in datasets:
        ids = conditions.given.get(dataset.id, ())
        complete.append(dataset.model_copy(update={SERVANTS: ids}))
        if problem := _problem(dataset, ids, known=known, conditions=conditions):
            source.add(f"{dataset.id}.{SERVANTS}", problem)
    for each in masks:
        for owner in conditions.owners(each.id):
            if owner not in conditions.names:
                hint = nearest(owner, conditions.names - {each.id})
                source.reject(f"{each.id}.{OWNER}", owner, f"no entry has this id.{hint}")
    used = {identity for dataset in complete for identity in dataset.conditioning_data}
    return tuple(complete), tuple(each for each in masks if each.id in used)


def _problem(
    dataset: DatasetConfig,
    ids: Sequence[str],
    *,
    known: Mapping[str, ConditioningConfig],
    conditions: Conditions,
) -> str | None:
    """Why the entries cannot condition a dataset."""
    if missing := [each for each in ids if each not in conditions.names]:
        hint = nearest(missing[0], conditions.names - {dataset.id})
        return f'"{missing[0]}": no entry has this id.{hint}'
    if disabled := [each for each in ids if each in conditions.disabled]:
        return f'"{disabled[0]}": this entry is disabled. Remove it from here too.'
    if len(ids) > 1:
        return f"{', '.join(ids)}: an image has one mask. Name one of them."
    if ids and dataset.alpha_mask:
        return f"{ids[0]}: an image has one mask, and alpha_mask gives another. Remove one of the keys."
    folders = [known[each].instance_data_dir for each in ids if each in known]
    for folder in folders:
        if folder.is_relative_to(dataset.instance_data_dir):
            return (
                f"the folder {folder} lies in that of the images, which are all trained on. Move the masks."
            )
    return None


def _ids(value: JsonValue) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if isinstance(each, str | int | float) and not is_off(each)]

"""Entries of the dataset json whose images condition those of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source, build
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig, ConditioningType
from simpletuner.helpers.configuration.schema.references import CROP_KEYS, REFERENCE_TYPES, ReferenceConfig
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.problems import nearest, shown

TYPE, OWNER, SERVANTS = "conditioning_type", "source_dataset_id", "conditioning_data"
REMEDY = 'Remove the entry, or set "disabled": true in it.'
CAPTIONS = "captions"
ALL_TYPES = frozenset(get_args(ConditioningType)) | REFERENCE_TYPES
_KINDS = "mask or segmentation for masks, reference_strict or reference_loose for reference images"
_SOURCE, _PROMPT = "caption_strategy", "instance_prompt"
_CUT = "The images have such keys, and {} gets their resize and crop."
_LOOSE = "The images have such keys, and references get their resolution."
_UNREAD_CAPTIONS = "An image is trained with its own caption."


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
    references: frozenset[str] = frozenset()
    """The ids of entries of references."""

    def most_beside(self, identity: str) -> int:
        """The largest number of entries of references that one entry which it conditions has."""
        return max(
            (len(self.references & set(self.given[each])) for each in self.owners(identity)), default=1
        )

    def owners(self, identity: str) -> tuple[str, ...]:
        """The entries that this one conditions."""
        return tuple(owner for owner, ids in self.given.items() if identity in ids)


def conditions_of(entries: Sequence[JsonValue]) -> Conditions:
    """Read which entries condition which, from all entries of a dataset json."""
    given: dict[str, list[str]] = {}
    names: set[str] = set()
    disabled: set[str] = set()
    kinds: set[str] = set()
    references: set[str] = set()
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
            references |= {identity} if values[TYPE] in REFERENCE_TYPES else set()
        if not is_conditioning(values):
            given.setdefault(identity, []).extend(_ids(values.get(SERVANTS)))
        for owner in _ids(values.get(OWNER)):
            given.setdefault(owner, []).append(identity)
    unique = {owner: tuple(dict.fromkeys(ids)) for owner, ids in given.items() if ids}
    if unique and not kinds:
        kinds.add("")
    return Conditions(unique, frozenset(names), frozenset(disabled), frozenset(kinds), frozenset(references))


def is_conditioning(values: Mapping[str, JsonValue]) -> bool:
    """Whether an entry says of itself that its images condition others."""
    is_named = values.get("dataset_type") == "conditioning"
    return is_named or not is_off(values.get(TYPE)) or not is_off(values.get(OWNER))


def read_conditioning(
    values: Mapping[str, JsonValue], source: Source, *, conditions: Conditions
) -> tuple[ConditioningConfig | ReferenceConfig | None, list[Decision]]:
    """Check an entry whose images condition others, by the names of keys here."""
    if is_off(values.get(TYPE)):
        source.add(TYPE, f"required, but missing: {_KINDS}. If it is not needed: {REMEDY}")
        return None, []
    if advice := UNSUPPORTED_VALUES.get((TYPE, str(values[TYPE]))):
        source.reject(TYPE, values[TYPE], f"known from SimpleTuner, not supported here. {advice}")
        return None, []
    if values[TYPE] not in ALL_TYPES:
        source.reject(TYPE, values[TYPE], f"must be {_KINDS}.{nearest(str(values[TYPE]), ALL_TYPES)}")
        return None, []
    if not is_off(values.get(SERVANTS)):
        source.reject(SERVANTS, values[SERVANTS], "this entry conditions others and has none. Remove it.")
    identity = str(values.get("id"))
    decisions: list[Decision] = []
    if values[TYPE] in REFERENCE_TYPES:
        section: type[ConditioningConfig | ReferenceConfig] = ReferenceConfig
        values, decisions = _reference(values, source, num_sets=conditions.most_beside(identity))
    else:
        section = ConditioningConfig
    unread = (DatasetConfig.model_fields.keys() - section.model_fields.keys()) & values.keys()
    loose = values[TYPE] == "reference_loose"
    reason = _LOOSE if loose else _CUT.format("a mask" if section is ConditioningConfig else "a reference")
    decisions += [
        Decision(f"{source.prefix}{key}", value, "no effect", "", reason)
        for key, value in values.items()
        if key in unread and key != SERVANTS
    ]
    kept = {key: value for key, value in values.items() if key not in unread and key != OWNER}
    built = build(section, kept, source)
    if "id" in values and not conditions.owners(identity):
        text = f'no entry names it. Add "{SERVANTS}": "{identity}" to the entry of its images, or remove it.'
        source.reject("id", identity, text)
    return built.section if not built.invalid_keys else None, decisions


def _reference(
    values: Mapping[str, JsonValue], source: Source, *, num_sets: int
) -> tuple[dict[str, JsonValue], list[Decision]]:
    """The values of an entry of references; its captions, and what becomes of keys without effect.

    SimpleTuner reads the captions of an entry of references only where an image has several.
    """
    kept = dict(values)
    decisions: list[Decision] = []
    if kept[TYPE] == "reference_strict":
        crop = {key: kept.pop(key) for key in CROP_KEYS if key in kept}
        defaults = {key: ReferenceConfig.model_fields[key].default for key in crop}
        decisions += [
            Decision(f"{source.prefix}{key}", value, "no effect", "", _CUT.format("a reference"))
            for key, value in crop.items()
            if not is_off(value) and value != defaults[key]
        ]
    strategy = kept.pop(_SOURCE, None)
    prompt = kept.pop(_PROMPT, None)
    if is_off(strategy) or num_sets == 1:
        for key, value in ((_SOURCE, strategy), (_PROMPT, prompt)):
            if not is_off(value):
                decisions.append(Decision(f"{source.prefix}{key}", value, "no effect", "", _UNREAD_CAPTIONS))
    elif strategy in ("instanceprompt", "instance_prompt") and not is_off(prompt):
        kept.setdefault(CAPTIONS, prompt)
        ours = f"{CAPTIONS}: {shown(prompt)}"
        decisions += [
            Decision(f"{source.prefix}{key}", value, "translated", ours, "")
            for key, value in ((_SOURCE, strategy), (_PROMPT, prompt))
        ]
    else:
        text = "captions of references come from captions, a text or a list. Give that, or remove this key."
        source.reject(_SOURCE, strategy, text)
    return kept, decisions


def paired(
    datasets: Sequence[DatasetConfig],
    found: Sequence[ConditioningConfig | ReferenceConfig],
    *,
    conditions: Conditions,
    source: Source,
) -> tuple[tuple[DatasetConfig, ...], tuple[ConditioningConfig | ReferenceConfig, ...]]:
    """The datasets with the ids of what conditions them, and the entries that do; notes problems."""
    known = {each.id: each for each in found}
    complete: list[DatasetConfig] = []
    for dataset in datasets:
        ids = conditions.given.get(dataset.id, ())
        complete.append(dataset.model_copy(update={SERVANTS: ids}))
        if problem := _problem(dataset, ids, known=known, conditions=conditions):
            source.add(f"{dataset.id}.{SERVANTS}", problem)
    for each in found:
        for owner in conditions.owners(each.id):
            if owner not in conditions.names:
                hint = nearest(owner, conditions.names - {each.id})
                source.reject(f"{each.id}.{OWNER}", owner, f"no entry has this id.{hint}")
    used = {identity for dataset in complete for identity in dataset.conditioning_data}
    return tuple(complete), tuple(each for each in found if each.id in used)


def _problem(
    dataset: DatasetConfig,
    ids: Sequence[str],
    *,
    known: Mapping[str, ConditioningConfig | ReferenceConfig],
    conditions: Conditions,
) -> str | None:
    """Why the entries cannot condition a dataset."""
    if twice := [each for each, number in Counter(dataset.conditioning_data).items() if number > 1]:
        return f'"{twice[0]}": named more than once. Name it once.'
    if missing := [each for each in ids if each not in conditions.names]:
        hint = nearest(missing[0], conditions.names - {dataset.id})
        return f'"{missing[0]}": no entry has this id.{hint}'
    if disabled := [each for each in ids if each in conditions.disabled]:
        return f'"{disabled[0]}": this entry is disabled. Remove it from here too.'
    masks = [each for each in ids if isinstance(known.get(each), ConditioningConfig)]
    if len(masks) > 1:
        return f"{', '.join(masks)}: an image has one mask. Name one of them."
    if masks and dataset.alpha_mask:
        return f"{masks[0]}: an image has one mask, and alpha_mask gives another. Remove one of the keys."
    for entry in (known[each] for each in ids if each in known):
        folder, images = entry.folder, dataset.folder
        if folder is not None and images is not None and folder.is_relative_to(images):
            return (
                f"the folder {folder} of {entry.id} lies in that of the images, which are all trained on. "
                "Move its images."
            )
    return None


def _ids(value: JsonValue) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if isinstance(each, str | int | float) and not is_off(each)]

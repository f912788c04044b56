"""Reads the dataset json as DatasetConfigs, which inherit keys of config.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes, unread_suffixes
from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.loading.building import Source, Validated, build
from simpletuner.helpers.configuration.loading.conditioning import (
    CAPTIONS,
    OWNER,
    REMEDY,
    TYPE,
    Conditions,
    conditions_of,
    is_conditioning,
    paired,
    read_conditioning,
)
from simpletuner.helpers.configuration.loading.relations import Context
from simpletuner.helpers.configuration.loading.remote_folders import (
    hide_secrets,
    with_url,
    without_secrets,
    without_storage,
)
from simpletuner.helpers.configuration.loading.row_entries import unnested
from simpletuner.helpers.configuration.loading.several_resolutions import at_each_resolution, with_copies
from simpletuner.helpers.configuration.loading.translation import (
    File,
    rename_keys,
    tables,
    translate_values,
)
from simpletuner.helpers.configuration.schema.base import OutputPath, Section, takes_empty_text
from simpletuner.helpers.configuration.schema.captions import CaptionFilters
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import REFERENCE_TYPES, ReferenceConfig
from simpletuner.helpers.configuration.schema.row_keys import HUB
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.configuration.schema.tar_places import is_tar
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.io.names import counted

INHERITED = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "max_upscale_threshold",
    "caption_strategy",
    "caption_lines",
    "instance_prompt",
    "eval_share",
)
_NEVER_TRAINED = ("repeats", "probability", "caption_dropout_probability", "eval_share")
"""Keys without effect in an entry of held-out images."""
_OF_SUBJECT = ("instance_prompt", "eval_share")
"""Keys that regularisation data does not inherit."""
SWITCHES = ("disabled", "disable_multiline_split")
"""Keys that are true or false, besides those of a section."""
_NO_TARGET = (
    'its images must not be trained on. Set "conditioning_type": "mask" for masks, "reference_strict" or '
    f'"reference_loose" for reference images. If it is not needed: {REMEDY}'
)
_LATENTS = "cache_dir_vae names the folder of latents."
_SWITCHES = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
    "": False,
}


class TextCacheEntry(Section):
    """An entry with dataset_type text_embeds; it names the text cache."""

    id: str = "text-embeds"
    """Name of the entry."""
    cache_dir: OutputPath | None = None
    """Folder of cached prompt embeds; overrides cache_dir_text of config.json."""
    caption_filter_list: CaptionFilters = ()
    """As in a dataset, for the captions of all of them; taken before a dataset's own."""
    default: bool = False
    """Whether this entry counts if there are several."""


@dataclass(frozen=True)
class DatasetFile:
    """Content of the dataset json."""

    datasets: tuple[DatasetConfig, ...]
    cache_dir_text: Path | None
    """cache_dir of the text_embeds entry."""
    conditioning: tuple[ConditioningConfig, ...] = ()
    """The entries of masks that the datasets' conditioning_data names."""
    references: tuple[ReferenceConfig, ...] = ()
    """The entries of reference images that it names."""
    mask_kinds: frozenset[str] = frozenset()
    """Kinds of masks that entries ask for, be they valid or not: conditioning_type, alpha, "" if unknown."""
    decisions: tuple[Decision, ...] = ()
    """What became of every key that does not stay as it is."""
    names: frozenset[str] = frozenset()
    """The id of every dataset that is not disabled, be it valid or not."""

    def folders(self) -> dict[str, Path]:
        """Id -> folder on this machine of the images, masks or references."""
        entries = (*self.datasets, *self.conditioning, *self.references)
        return {each.id: each.folder for each in entries if each.folder is not None}


def read_datasets(entries: JsonValue, source: Source, *, data: Validated[DataConfig]) -> DatasetFile:
    """Check a dataset json; leaves out disabled and invalid entries and notes every problem."""
    if not isinstance(entries, list):
        source.add("", "must hold an array of objects, [{...}].")
        return DatasetFile((), None)
    datasets: list[DatasetConfig] = []
    conditioning: list[ConditioningConfig | ReferenceConfig] = []
    text_caches: list[TextCacheEntry] = []
    decisions: list[Decision] = []
    first_with: dict[str, int] = {}
    copies: dict[str, list[str]] = {}
    num_images = 0
    conditions = conditions_of(entries)
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            source.reject(f"[{index}]", entry, "must be an object, {...}.")
            continue
        values = {key.removeprefix("--"): value for key, value in entry.items() if value is not None}
        hide_secrets(values)
        identity = values.get("id")
        named = isinstance(identity, str) and identity not in first_with
        own = replace(source, prefix=f"{identity}." if named else f"[{index}].")
        if _is_disabled(values, own):
            continue
        if not named and isinstance(identity, str):
            own.reject("id", identity, f"[{first_with[identity]}] has this id too. Change one.")
        elif isinstance(identity, str):
            first_with[identity] = index
        kind = values.get("dataset_type")
        if kind == "image_embeds" and without_storage(values)[0].get("type", "local") == "local":
            found = [Decision(f"{own.prefix}dataset_type", kind, "no effect", "", _LATENTS)]
        elif kind == "text_embeds":
            text_cache, found = _text_cache(values, own)
            text_caches.append(text_cache)
        elif is_conditioning(values):
            read, found = _conditioning(values, own, conditions=conditions)
            conditioning += [read] if read is not None else []
            num_images += read is None  # one problem is enough
        else:
            owners = conditions.owners(str(identity))
            own_copies, found = at_each_resolution(values, own, index=index, first_with=first_with)
            copies[str(identity)] = [str(each.get("id")) for each in own_copies]
            read_copies = [_image_dataset(each, own, data=data, owners=owners) for each in own_copies]
            datasets += [dataset for dataset, _ in read_copies if dataset is not None]
            found = [*found, *(line for _, lines in read_copies[:1] for line in lines)]
            num_images += max(1, len(own_copies)) * (kind not in ("image_embeds", "eval"))
        decisions += found
    _check_subject(datasets, num_images, source)
    chosen = _chosen(text_caches, source)
    filtered = tuple(_with_filters(each, chosen.caption_filter_list) for each in datasets)
    conditions = with_copies(conditions, copies)
    filtered, used = paired(filtered, conditioning, conditions=conditions, source=source)
    return DatasetFile(
        filtered,
        chosen.cache_dir,
        conditioning=tuple(each for each in used if isinstance(each, ConditioningConfig)),
        references=tuple(each for each in used if isinstance(each, ReferenceConfig)),
        mask_kinds=(conditions.kinds - REFERENCE_TYPES) | {"alpha" for each in filtered if each.alpha_mask},
        decisions=tuple(decisions),
        names=frozenset(name for identity, own in copies.items() for name in own or (identity,)),
    )


def _check_subject(datasets: list[DatasetConfig], num_images: int, source: Source) -> None:
    """Check that some images are trained on, beside those that keep what the model knows."""
    datasets = [each for each in datasets if each.is_trained]
    if num_images == 0:
        source.add("", "no enabled image dataset. Add one.")
    elif len(datasets) == num_images and all(each.is_regularisation_data for each in datasets):
        text = "every image dataset has is_regularisation_data, so nothing is learnt. Add one without it."
        source.add("", text)


def _conditioning(
    values: Mapping[str, JsonValue], source: Source, *, conditions: Conditions
) -> tuple[ConditioningConfig | ReferenceConfig | None, list[Decision]]:
    """Check an entry of masks or references."""
    given = {key: value for key, value in values.items() if key not in ("cache_dir", "default")}
    known, decisions = _translated(given, source, is_text=False, inherited={})
    identity = known.get("id")
    if isinstance(identity, str):
        source = source.with_names(id=identity)
    read, found = read_conditioning(known, source, conditions=conditions)
    if read is not None and read.folder is not None:
        _check_images(read, read.folder, source)
    return read, [*decisions, *found]


def _is_disabled(values: Mapping[str, JsonValue], source: Source) -> bool:
    value = values.get("disabled", False)
    disabled = _SWITCHES.get(str(value).strip().lower())
    if disabled is None:
        source.reject("disabled", value, "must be true or false.")
    return bool(disabled)


def _image_dataset(
    values: Mapping[str, JsonValue], source: Source, *, data: Validated[DataConfig], owners: Sequence[str]
) -> tuple[DatasetConfig | None, list[Decision]]:
    """Check an entry of images; `owners` are the entries whose conditioning_data it is."""
    if owners and values.get("dataset_type", "image") in ("image", "eval"):
        source.reject("id", values["id"], f"is conditioning_data of {owners[0]}: {_NO_TARGET}")
        return None, []
    values = dict(values)
    for key in ("default",) if values.get("type") == HUB else ("cache_dir", "default"):
        if _SWITCHES.get(str(values.pop(key, False)).strip().lower()) is not False:
            advice = "Use cache_dir_vae." if key == "cache_dir" else "Remove it."
            source.add(key, f"belongs to an entry with dataset_type text_embeds. {advice}")
    inherited: dict[str, object] = dict(data.section) if data.section is not None else {}
    known, decisions = _translated(values, source, is_text=False, inherited=inherited)
    complete, found = _completed(known, source, inherited=inherited)
    decisions += found
    identity = known.get("id")
    if isinstance(identity, str):
        source = source.with_names(id=identity)
        if "cache_dir_vae" in inherited:
            complete.setdefault("cache_dir_vae", str(Path(str(inherited["cache_dir_vae"])) / identity))
    placeholders = {"id": "?"}
    if complete.get("type", "local") == "local":
        placeholders["instance_data_dir"] = os.curdir
    built = build(DatasetConfig, complete, source, placeholders=placeholders)
    if dataset := built.if_valid("instance_data_dir"):
        _check_folder(dataset, source)
    return built.section if not built.invalid_keys else None, decisions


def _completed(
    known: Mapping[str, JsonValue], source: Source, *, inherited: Mapping[str, object]
) -> tuple[dict[str, object], list[Decision]]:
    """An entry of images with what it inherits of config.json, and its keys without effect."""
    is_of_class = not is_off(known.get("is_regularisation_data"))
    unshared = {*(_OF_SUBJECT if is_of_class else ())}
    record = IMAGE_SOURCES.named(known.get("type", "local"))
    if record is not None and record.holds_rows:
        unshared.add("caption_strategy")  # that of config.json is for files
    complete = {key: inherited[key] for key in INHERITED if key in inherited and key not in unshared}
    complete |= known
    if known.get("dataset_type") != "eval":
        return complete, []
    reason = "Its images are held out: each is evaluated as it is, and none is trained."
    for key in _NEVER_TRAINED:
        complete.pop(key, None)
    defaults = DatasetConfig.model_fields
    unread = [key for key in _NEVER_TRAINED if key in known and known[key] != defaults[key].default]
    return complete, [
        Decision(f"{source.prefix}{key}", known[key], "no effect", "", reason) for key in unread
    ]


def translate_entry(
    entry: Mapping[str, JsonValue], *, prefix: str, inherited: Mapping[str, object]
) -> tuple[dict[str, JsonValue], list[Decision]]:
    """An entry in our names, and what became of each other key.

    Args:
        entry: The entry as written.
        prefix: Precedes each key in the decisions.
        inherited: Values of config.json.
    """
    given = {key.removeprefix("--"): value for key, value in entry.items() if value is not None}
    is_text = given.get("dataset_type") == "text_embeds"
    fixed: dict[str, JsonValue] = {
        key: given[key] for key in ("type", "dataset_type", "disabled") if key in given and is_text
    }
    open_values, secrets = without_secrets(given)
    others, stored = (open_values, []) if is_text else with_url(open_values)
    others = {key: value for key, value in others.items() if key not in fixed}
    values, decisions = _translations(others, is_text=is_text, inherited=inherited)
    decisions = [*secrets, *stored, *decisions]
    return {**fixed, **values}, [replace(each, key=f"{prefix}{each.key}") for each in decisions]


def _translated(
    values: Mapping[str, JsonValue], source: Source, *, is_text: bool, inherited: Mapping[str, object]
) -> tuple[dict[str, JsonValue], list[Decision]]:
    """The values of the section's keys, and what became of the others; notes each that is refused."""
    values, stored = (values, []) if is_text else with_url(values)
    known, decisions = _translations(values, is_text=is_text, inherited=inherited)
    decisions = [*stored, *decisions]
    for each in decisions:
        if each.outcome == "not translated":
            source.add(each.key, each.text)
    return known, [replace(each, key=f"{source.prefix}{each.key}") for each in decisions]


def _translations(
    values: Mapping[str, JsonValue], *, is_text: bool, inherited: Mapping[str, object]
) -> tuple[dict[str, JsonValue], list[Decision]]:
    """The values of an entry, of text embeds or of images, in our names, and what became of the others."""
    section: type[Section] = TextCacheEntry if is_text else DatasetConfig
    file: File = "text_embeds" if is_text else "dataset"
    flat, unnesting = (values, []) if is_text else unnested(values)
    renamed = rename_keys(file, flat.items())
    own = {*section.model_fields, *(() if is_text else (TYPE, OWNER, CAPTIONS))}
    translation = translate_values(
        file,
        {
            key: value
            for key, value in renamed.values.items()
            if key not in (TYPE, OWNER) or not is_off(value)
        },
        owned=own,
        known=own,
        context=Context({**inherited, **renamed.values}),
        takes_empty=lambda key: takes_empty_text(section, key),
    )
    return translation.values, [*unnesting, *renamed.decisions, *translation.decisions]


def _text_cache(values: Mapping[str, JsonValue], source: Source) -> tuple[TextCacheEntry, list[Decision]]:
    values, stored = without_storage(values)
    storage, identity = values.get("type", "local"), values.get("id")
    if storage != "local":
        advice = "Use local: prompt embeds are cached in a local folder, cache_dir."
        source.reject("type", storage, f"not supported here. {advice}")
    others = {key: value for key, value in values.items() if key not in ("type", "dataset_type", "disabled")}
    image_keys = DatasetConfig.model_fields.keys() - TextCacheEntry.model_fields.keys()
    without_effect = tables("text_embeds").without_effect
    for key in [key for key in others if key in image_keys and not any(without_effect(key))]:
        source.add(key, "belongs to an image dataset. Remove it.")
        del others[key]
    known, decisions = _translated(others, source, is_text=True, inherited={})
    if isinstance(identity, str):
        source = source.with_names(id=identity)
    decisions = [*(replace(each, key=f"{source.prefix}{each.key}") for each in stored), *decisions]
    return build(TextCacheEntry, known, source).section or TextCacheEntry(), decisions


def _with_filters(dataset: DatasetConfig, shared: tuple[str, ...]) -> DatasetConfig:
    """The dataset with the filters of all datasets before its own."""
    return dataset.model_copy(update={"caption_filter_list": (*shared, *dataset.caption_filter_list)})


def _chosen(entries: list[TextCacheEntry], source: Source) -> TextCacheEntry:
    default = [entry for entry in entries if entry.default] or entries
    if len(default) > 1:
        names = ", ".join(entry.id for entry in default)
        source.add("", f'several text_embeds entries: {names}. Set "default": true in one of them alone.')
    return default[0] if default else TextCacheEntry()


def _check_folder(dataset: DatasetConfig, source: Source) -> None:
    folder = dataset.folder
    if folder is None or not _check_images(dataset, folder, source):
        return
    cache = dataset.cache_dir_vae
    if cache is not None and cache.is_relative_to(folder):
        text = "is inside instance_data_dir, which is never written to. Choose another."
        source.reject("cache_dir_vae", str(cache), text)


def _check_images(entry: ImagePlace, folder: Path, source: Source) -> bool:
    """Note what is wrong with the folder of an entry; whether it can be read."""
    if not os.access(folder, os.R_OK | os.X_OK):
        source.reject("instance_data_dir", str(folder), "cannot be read. Change its permissions.")
        return False
    if IMAGE_SOURCES[entry.source].needs_folder and (reason := _without_images(folder)):
        source.reject("instance_data_dir", str(folder), reason)
    return True


def _without_images(folder: Path) -> str | None:
    """The error message for a folder without an image that can be read; None for every other folder."""
    readable, unread = image_suffixes(), unread_suffixes()
    reasons: Counter[str] = Counter()
    num_archives = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            num_archives += is_tar(name)
            if name.startswith(".") or (suffix not in readable and suffix not in unread):
                continue
            if conditioned_stem(f"{os.path.basename(parent)}/{name}") is not None:
                reasons["named as masks or source images of others"] += 1
            elif suffix in readable:
                return None
            else:
                reasons[f"{suffix}: {unread[suffix]}"] += 1
    found = "".join(
        f" It holds {counted(number, 'image that is', 'images that are')} {reason}."
        for reason, number in reasons.items()
    )
    if num_archives:
        found += f' It holds {counted(num_archives, "tar archive")}: "type": "webdataset" trains from them.'
    return f"holds no image ({', '.join(sorted(readable))}).{found} Put images there or correct the path."

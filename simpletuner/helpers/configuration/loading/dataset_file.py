"""Reads the dataset json as DatasetConfigs, which inherit keys of config.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes, unread_suffixes
from simpletuner.helpers.configuration.loading.building import Source, Validated, build
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.loading.unsupported_keys import key_problem
from simpletuner.helpers.configuration.schema.base import OutputPath, Section
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.problems import shown
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
)
_MULTILINE_SPLIT = "disable_multiline_split"
"""SimpleTuner's spelling of caption_lines: true is whole, false is choose."""
SWITCHES = ("disabled", _MULTILINE_SPLIT)
"""Keys that are true or false, besides those of a section."""
_NO_TARGET = (
    "its images must not be trained on, and conditioning on them is not supported. Remove the entry, or set "
    '"disabled": true in it.'
)
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
    default: bool = False
    """Whether this entry counts if there are several."""


@dataclass(frozen=True)
class DatasetFile:
    """Content of the dataset json."""

    datasets: tuple[DatasetConfig, ...]
    cache_dir_text: Path | None
    """cache_dir of the text_embeds entry."""


def read_datasets(entries: JsonValue, source: Source, *, data: Validated[DataConfig]) -> DatasetFile:
    """Check a dataset json; leaves out disabled and invalid entries and notes every problem."""
    if not isinstance(entries, list):
        source.add("", "must hold an array of objects, [{...}].")
        return DatasetFile((), None)
    datasets: list[DatasetConfig] = []
    text_caches: list[TextCacheEntry] = []
    first_with: dict[str, int] = {}
    num_images = 0
    conditioning = _conditioning_data(entries)
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            source.reject(f"[{index}]", entry, "must be an object, {...}.")
            continue
        values = {key.removeprefix("--"): value for key, value in entry.items() if value is not None}
        identity = values.get("id")
        named = isinstance(identity, str) and identity not in first_with
        own = replace(source, prefix=f"{identity}." if named else f"[{index}].")
        if _is_disabled(values, own):
            continue
        if not named and isinstance(identity, str):
            own.reject("id", identity, f"[{first_with[identity]}] has this id too. Change one.")
        elif isinstance(identity, str):
            first_with[identity] = index
        if values.get("dataset_type") == "text_embeds":
            text_caches.append(_text_cache(values, own))
        elif dataset := _image_dataset(values, own, data=data, owner=conditioning.get(str(identity))):
            datasets.append(dataset)
        num_images += values.get("dataset_type") != "text_embeds"
    if num_images == 0:
        source.add("", "no enabled image dataset. Add one.")
    return DatasetFile(tuple(datasets), _chosen(text_caches, source))


def _conditioning_data(entries: list[JsonValue]) -> dict[str, str]:
    """Id -> the entry whose conditioning_data names it."""
    named: dict[str, str] = {}
    for index, entry in enumerate(entries):
        items = entry.items() if isinstance(entry, dict) else ()
        values = {key.removeprefix("--"): value for key, value in items}
        found = values.get("conditioning_data")
        for identity in found if isinstance(found, list) else [found]:
            if isinstance(identity, str | int | float) and not is_off(identity):
                named[str(identity)] = str(values.get("id", f"[{index}]"))
    return named


def _is_image(values: Mapping[str, JsonValue]) -> bool:
    """Whether an entry would be trained on: otherwise its own keys say that it is not supported."""
    return values.get("dataset_type", "image") == "image" and is_off(values.get("conditioning_type"))


def _with_caption_lines(values: Mapping[str, JsonValue], source: Source) -> Mapping[str, JsonValue]:
    """The values with caption_lines in place of disable_multiline_split."""
    if _MULTILINE_SPLIT not in values:
        return values
    others = {key: value for key, value in values.items() if key != _MULTILINE_SPLIT}
    is_whole = _SWITCHES.get(str(values[_MULTILINE_SPLIT]).strip().lower())
    if is_whole is None:
        source.reject(_MULTILINE_SPLIT, values[_MULTILINE_SPLIT], "must be true or false.")
        return others
    lines = "whole" if is_whole else "choose"
    given = others.get("caption_lines", lines)
    if given != lines:
        text = f"means caption_lines {lines}, but caption_lines is {shown(given)}. Keep one."
        source.reject(_MULTILINE_SPLIT, values[_MULTILINE_SPLIT], text)
    return others | {"caption_lines": given}


def _is_disabled(values: Mapping[str, JsonValue], source: Source) -> bool:
    value = values.get("disabled", False)
    disabled = _SWITCHES.get(str(value).strip().lower())
    if disabled is None:
        source.reject("disabled", value, "must be true or false.")
    return bool(disabled)


def _image_dataset(
    values: Mapping[str, JsonValue], source: Source, *, data: Validated[DataConfig], owner: str | None
) -> DatasetConfig | None:
    """Check an entry of images; `owner` is the entry whose conditioning_data it is."""
    if owner is not None and _is_image(values):
        source.reject("id", values["id"], f"is conditioning_data of {owner}: {_NO_TARGET}")
        return None
    values = _with_caption_lines(values, source)
    known = _known(values, DatasetConfig, source)
    for key in ("cache_dir", "default"):
        if key in values and _SWITCHES.get(str(values[key]).lower()) is not False:
            advice = "Use cache_dir_vae." if key == "cache_dir" else "Remove it."
            source.add(key, f"belongs to an entry with dataset_type text_embeds. {advice}")
    inherited: dict[str, object] = dict(data.section) if data.section is not None else {}
    complete = {key: inherited[key] for key in INHERITED if key in inherited} | known
    identity = known.get("id")
    if isinstance(identity, str):
        source = source.with_names(id=identity)
        if "cache_dir_vae" in inherited:
            complete.setdefault("cache_dir_vae", str(Path(str(inherited["cache_dir_vae"])) / identity))
    placeholders = {"id": "?", "instance_data_dir": os.curdir}
    built = build(DatasetConfig, complete, source, placeholders=placeholders)
    if dataset := built.if_valid("instance_data_dir"):
        _check_folder(dataset, source)
    return built.section if not built.invalid_keys else None


def _known(values: Mapping[str, JsonValue], section: type[Section], source: Source) -> dict[str, JsonValue]:
    """The values of the section's keys; notes every unknown key."""
    for key, value in values.items():
        if key in TextCacheEntry.model_fields or key in DatasetConfig.model_fields:
            continue
        if problem := key_problem("dataset", key, value, known=section.model_fields):
            source.add(key, problem)
    return {key: value for key, value in values.items() if key in section.model_fields}


def _text_cache(values: Mapping[str, JsonValue], source: Source) -> TextCacheEntry:
    storage, identity = values.get("type", "local"), values.get("id")
    if storage != "local":
        advice = UNSUPPORTED_VALUES.get(("type", str(storage)), "Use local.")
        source.reject("type", storage, f"not supported here. {advice}")
    known = _known(values, TextCacheEntry, source)
    image_keys = DatasetConfig.model_fields.keys() - TextCacheEntry.model_fields.keys()
    for key in values:
        if key in image_keys - {"type", "dataset_type", "disabled"}:
            source.add(key, "belongs to an image dataset. Remove it.")
    if isinstance(identity, str):
        source = source.with_names(id=identity)
    return build(TextCacheEntry, known, source).section or TextCacheEntry()


def _chosen(entries: list[TextCacheEntry], source: Source) -> Path | None:
    default = [entry for entry in entries if entry.default] or entries
    if len(default) > 1:
        names = ", ".join(entry.id for entry in default)
        source.add("", f'several text_embeds entries: {names}. Set "default": true in one of them alone.')
    return default[0].cache_dir if default else None


def _check_folder(dataset: DatasetConfig, source: Source) -> None:
    folder = dataset.instance_data_dir
    if not os.access(folder, os.R_OK | os.X_OK):
        source.reject("instance_data_dir", str(folder), "cannot be read. Change its permissions.")
        return
    if reason := _without_images(folder):
        source.reject("instance_data_dir", str(folder), reason)
    cache = dataset.cache_dir_vae
    if cache is not None and cache.is_relative_to(folder):
        text = "is inside instance_data_dir, which is never written to. Choose another."
        source.reject("cache_dir_vae", str(cache), text)


def _without_images(folder: Path) -> str | None:
    """The error message for a folder without an image that can be read; None for every other folder."""
    readable, unread = image_suffixes(), unread_suffixes()
    reasons: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
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
    return f"holds no image ({', '.join(sorted(readable))}).{found} Put images there or correct the path."

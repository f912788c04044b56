"""Folders and dataset files of kohya's scripts as datasets, and the length of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import number
from simpletuner.helpers.configuration.migration.arithmetic import (
    Draws,
    Length,
    full_and_partial_batches,
    kohya_bucket,
    kohya_bucket_without_upscaling,
    kohya_buckets,
    kohya_regularisation,
    steps_per_epoch,
)
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.kohya_captions import Levels, put_captions
from simpletuner.helpers.configuration.migration.paths import PLACEHOLDER, Place, repeated_folder, unique_id
from simpletuner.helpers.configuration.migration.reading import read_structured
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.migration.tags import share_dropout
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import counted

_NOTHING_TO_TRAIN = "there is no folder of images: give train_data_dir, or dataset_config with image_dir."


@dataclass(slots=True)
class Dataset:
    """Subsets that share buckets and a batch size."""

    levels: Levels
    subsets: list[Levels] = field(default_factory=list)
    batch_size: int = 1
    entries: list[dict[str, JsonValue]] = field(default_factory=list)
    """What becomes of the subsets."""
    draws: list[Draws] | None = field(default_factory=list)
    """Of the images that are learnt; None if a folder is not at hand."""
    regularisation: list[Draws] = field(default_factory=list)
    """Of each regularisation image."""

    def all_draws(self) -> list[Draws]:
        """Of both kinds of images."""
        draws = self.draws or []
        return draws + kohya_regularisation(self.regularisation, sum(draw.number for draw in draws))


def put_data(settings: Settings, place: Place, *, is_preset: bool, alignment: int) -> None:
    """The datasets of a run, and the keys that say how long it is.

    Args:
        settings: The run's; its draft gets both.
        place: Where paths begin.
        is_preset: Images may be missing.
        alignment: Widths and heights must be multiples of this many pixels here.

    Raises:
        ConfigError: There is no folder of images, or a dataset file is damaged.
    """
    draft = settings.draft
    if settings.text("dataset_config"):
        datasets = _datasets_of_file(settings, place)
    elif is_preset and not settings.text("train_data_dir"):
        datasets = [Dataset(Levels([settings]))]
        datasets[0].subsets.append(
            _level(settings, {"image_dir": PLACEHOLDER}, place="", outer=datasets[0].levels)
        )
        draft.to_do.append(f"Set instance_data_dir: the preset has no images, so it is {PLACEHOLDER}.")
    else:
        datasets = _folders(settings, place)
    for dataset in datasets:
        at = dataset.levels.at("batch_size")
        dataset.batch_size = (
            at.whole("batch_size") if at.has("batch_size") else settings.whole("train_batch_size", 1)
        )
        first = len(draft.datasets)
        for levels in dataset.subsets:
            _subset(levels, dataset, place=place, draft=draft)
        dataset.entries = draft.datasets[first:]
    if all("is_regularisation_data" in each for each in draft.datasets):
        raise ConfigError(f"{settings.place or 'The configuration'}: {_NOTHING_TO_TRAIN}")
    _batch_sizes(settings, datasets)
    _alignment(datasets, draft, smallest=alignment)
    share_dropout(draft)
    _length(settings, datasets)
    for dataset in datasets:
        for levels in (dataset.levels, *dataset.subsets):
            for each in levels.places[:-1]:
                each.finish(into={})


def _folders(settings: Settings, place: Place) -> list[Dataset]:
    """The folders N_name in train_data_dir; the folder itself where there are none."""
    key = "train_data_dir"
    folder = place.path(settings.text(key))
    if not folder:
        return []
    root = Path(folder)
    found = sorted(each for each in root.iterdir() if each.is_dir()) if root.is_dir() else []
    subsets = [(each, repeats) for each in found if (repeats := repeated_folder(each.name))]
    dataset = Dataset(Levels([settings]))
    if not subsets:
        values: dict[str, JsonValue] = {"image_dir": folder}
        dataset.subsets.append(_level(settings, values, place=f"{key}.", outer=dataset.levels))
        text = (
            "It has no folder N_name, which is all that kohya's scripts read: it is the dataset itself."
            if root.is_dir()
            else "Not here, so its folders N_name are not known: migrate where they are."
        )
        settings.decide(key, "approximate", ours=f"instance_data_dir: {folder}", text=text)
        if not root.is_dir():
            settings.draft.to_do.append(
                f"{folder}: make a dataset for each folder N_name, with repeats N - 1."
            )
    for each, (times, tokens) in subsets:
        values = {"image_dir": each.as_posix(), "num_repeats": times, "class_tokens": tokens}
        dataset.subsets.append(_level(settings, values, place=f"{each.name}.", outer=dataset.levels))
    if subsets:
        settings.decide(key, "translated", ours=counted(len(subsets), "dataset"))
    if regularisation := place.path(settings.text("reg_data_dir")):
        dataset.subsets += _regularisation_folders(settings, regularisation, dataset)
    return [dataset]


def _regularisation_folders(settings: Settings, folder: str, dataset: Dataset) -> list[Levels]:
    """The folders N_name in reg_data_dir."""
    key, root = "reg_data_dir", Path(folder)
    found = sorted(each for each in root.iterdir() if each.is_dir()) if root.is_dir() else []
    subsets = [(each, repeats) for each in found if (repeats := repeated_folder(each.name))]
    if not subsets:
        text = "It has no folder N_name here: migrate where its images are, or add a dataset of them."
        settings.decide(key, "not translated", text=text)
        return []
    settings.decide(key, "translated", ours=f"is_regularisation_data: {counted(len(subsets), 'dataset')}")
    return [
        _level(
            settings,
            {"image_dir": each.as_posix(), "num_repeats": times, "class_tokens": tokens, "is_reg": True},
            place=f"{each.name}.",
            outer=dataset.levels,
        )
        for each, (times, tokens) in subsets
    ]


def _level(settings: Settings, values: Mapping[str, JsonValue], *, place: str, outer: Levels) -> Levels:
    rows = load_table("kohya").rows("dataset")
    return Levels([Settings(values, rows, settings.draft, place=place), *outer.places])


def _datasets_of_file(settings: Settings, place: Place) -> list[Dataset]:
    key = "dataset_config"
    path = Path(place.path(settings.text(key)))
    if not path.is_file():
        raise ConfigError(f"{key}: {path} is not here, and it says where the images are. Correct the path.")
    content = read_structured(path)
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{path}: has no [[datasets]], so this is no whole dataset file of kohya's scripts."
        )
    settings.decide(key, "translated", ours="data_backend_config")
    general = _level(
        settings,
        _object(content.get("general", {}), path, "general"),
        place="general.",
        outer=Levels([settings]),
    )
    datasets = []
    for index, entry in enumerate(entries):
        values = _object(entry, path, f"datasets[{index}]")
        subsets = values.pop("subsets", [])
        levels = _level(settings, values, place=f"datasets[{index}].", outer=general)
        dataset = Dataset(levels)
        for number_, subset in enumerate(subsets if isinstance(subsets, list) else []):
            where = f"datasets[{index}].subsets[{number_}]"
            own = _object(subset, path, where)
            _check_subset(own, path, where)
            dataset.subsets.append(_level(settings, own, place=f"{where}.", outer=levels))
        datasets.append(dataset)
    return datasets


def _object(value: JsonValue, path: Path, where: str) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {where} must be a table of keys. Correct it.")
    return dict(value)


def _check_subset(values: Mapping[str, JsonValue], path: Path, where: str) -> None:
    for key in ("resolution", "batch_size"):
        if key in values:
            raise ConfigError(
                f"{path}: {where} has {key}, which belongs to [[datasets]]: its subsets share buckets, and "
                f"kohya's scripts refuse it too. Make one [[datasets]] for each {key}."
            )


def _subset(levels: Levels, dataset: Dataset, *, place: Place, draft: Draft) -> None:
    own = levels.at("image_dir")
    folder = place.path(own.text("image_dir"))
    for key in ("metadata_file", "conditioning_data_dir"):
        if levels.at(key).has(key):
            levels.at(key).skip(key)
    if not folder:
        raise ConfigError(f"{levels.places[0].place}image_dir is missing: {_NOTHING_TO_TRAIN}")
    entry: dict[str, JsonValue] = {}
    entry["id"] = unique_id(Path(folder).name, [str(each["id"]) for each in draft.datasets])
    entry["type"] = "local"
    at = levels.at("is_reg")
    is_regularisation = at.flag("is_reg")
    if is_regularisation:
        at.put("is_reg", "is_regularisation_data", True, into=entry)
        draft.config["regularisation_target"] = "data"
    own.put("image_dir", "instance_data_dir", folder, into=entry)
    repeats = levels.at("num_repeats")
    times = max(1, repeats.whole("num_repeats", 1))
    repeats.put("num_repeats", "repeats", times - 1, into=entry)
    _put_flip(levels, entry)
    _put_alpha_mask(levels, entry)
    resolution = _size(levels, entry)
    images = place.images(folder, with_subfolders=False)
    put_captions(levels, entry, images)
    draft.datasets.append(entry)
    if images is None or not images:
        dataset.draws = None
    elif is_regularisation:
        buckets = _buckets_of(levels, resolution) if dataset.batch_size > 1 else lambda _: resolution
        sizes = place.sizes(images) if dataset.batch_size > 1 else [resolution] * len(images)
        dataset.regularisation += [Draws(buckets(size), times) for size in sizes]
    elif dataset.draws is not None:
        if dataset.batch_size == 1:  # each image is a batch, whatever its size: none is opened
            dataset.draws.append(Draws(resolution, len(images) * times))
        else:
            buckets = _buckets_of(levels, resolution)
            dataset.draws += [Draws(buckets(size), times) for size in place.sizes(images)]
        if len(place.images(folder, with_subfolders=True) or []) > len(images):
            draft.to_do.append(
                f"Move the subfolders of {folder} away: kohya's scripts do not read them, this does."
            )


def _put_flip(levels: Levels, entry: dict[str, JsonValue]) -> None:
    at = levels.at("flip_aug")
    if at.flag("flip_aug"):
        at.put("flip_aug", "random_flip", True, into=entry)


def _put_alpha_mask(levels: Levels, entry: dict[str, JsonValue]) -> None:
    at = levels.at("alpha_mask")
    if at.flag("alpha_mask"):
        at.put("alpha_mask", "alpha_mask", True, into=entry)


def _size(levels: Levels, entry: dict[str, JsonValue]) -> Size:
    """Resolution and crop of a subset; returns the area of its buckets as a size."""
    at = levels.at("resolution")
    edges = [part for item in at.items("resolution") for part in str(item).split(",") if part.strip()]
    try:
        numbers = [int(float(edge)) for edge in edges]
    except ValueError:
        numbers = []
    if not numbers:
        raise at.error("resolution", "must be a number of pixels, or width and height, and it is needed.")
    width, height = numbers[0], numbers[-1]
    edge = round(math.sqrt(width * height), 2)
    note = "" if width == height else f"The edge of a square with the area of {width}x{height}."
    at.put("resolution", "resolution", number(edge), into=entry, text=note)
    entry["resolution_type"] = "pixel_area"
    bucketed, random = levels.at("enable_bucket"), levels.at("random_crop").flag("random_crop")
    if bucketed.flag("enable_bucket") or width != height:
        entry["crop"] = random
        if random:
            entry |= {"crop_aspect": "preserve", "crop_style": "random"}
        exact = bucketed.flag("enable_bucket")
        text = "" if exact else f"One size of {width}x{height} is not possible: each image keeps its shape."
        bucketed.decide(
            "enable_bucket", "translated" if exact else "approximate", ours="crop: false", text=text
        )
    else:
        entry |= {"crop": True, "crop_aspect": "square", "crop_style": "random" if random else "center"}
        bucketed.decide("enable_bucket", "translated", ours="crop: true, crop_aspect: square", text="")
    if levels.at("random_crop").has("random_crop"):
        levels.at("random_crop").skip("random_crop", outcome="translated")
    for key in ("bucket_no_upscale", "min_bucket_reso", "max_bucket_reso"):
        if levels.at(key).has(key):
            levels.at(key).skip(key, outcome="approximate")
    return Size(width=width, height=height)


def _buckets_of(levels: Levels, resolution: Size) -> Callable[[Size], Size]:
    """A function from the size of an image to its bucket."""
    if not levels.at("enable_bucket").flag("enable_bucket"):
        return lambda image: resolution
    step = max(1, levels.at("bucket_reso_steps").whole("bucket_reso_steps", 64))
    if levels.at("bucket_no_upscale").flag("bucket_no_upscale"):
        return lambda image: kohya_bucket_without_upscaling(image, resolution, step=step)
    smallest = max(step, levels.at("min_bucket_reso").whole("min_bucket_reso", 256))
    largest = levels.at("max_bucket_reso").whole("max_bucket_reso", 1024)
    largest = max(largest, resolution.width, resolution.height)
    buckets = kohya_buckets(resolution, smallest=smallest, largest=largest, step=step)
    return lambda image: kohya_bucket(image, buckets)


def _batch_sizes(settings: Settings, datasets: Sequence[Dataset]) -> None:
    sizes = list(dict.fromkeys(dataset.batch_size for dataset in datasets if dataset.subsets))
    settings.draft.config["train_batch_size"] = sizes[0]
    for dataset in datasets:
        at = dataset.levels.at("batch_size")
        if at.has("batch_size"):
            at.decide("batch_size", "translated", ours=f"train_batch_size: {dataset.batch_size}", text="")
        for entry in dataset.entries if dataset.batch_size != sizes[0] else ():
            entry["train_batch_size"] = dataset.batch_size
    if settings.whole("train_batch_size", 1) == sizes[0]:
        settings.put("train_batch_size", "train_batch_size", sizes[0], text="")
    else:
        settings.decide("train_batch_size", "no effect", text="batch_size of the dataset file counts.")


def _alignment(datasets: Sequence[Dataset], draft: Draft, *, smallest: int) -> None:
    steps: list[int] = []
    for dataset in datasets:
        at = dataset.levels.at("bucket_reso_steps")
        if not dataset.levels.at("enable_bucket").flag("enable_bucket"):
            continue
        step = max(1, at.whole("bucket_reso_steps", 64))
        steps.append(math.lcm(step, smallest))
        exact = steps[0] == step
        text = "" if exact else f"Buckets of this model are multiples of {smallest}."
        ours = f"aspect_bucket_alignment: {steps[0]}"
        at.decide("bucket_reso_steps", "translated" if exact else "approximate", ours=ours, text=text)
    if steps:
        draft.config["aspect_bucket_alignment"] = steps[0]


def _length(settings: Settings, datasets: Sequence[Dataset]) -> None:
    """max_train_steps by kohya's arithmetic; num_train_epochs if the images are not at hand."""
    draft = settings.draft
    accumulation = max(1, settings.whole("gradient_accumulation_steps", 1))
    processes = max(1, settings.whole("num_processes", 1))
    epochs = settings.whole("max_train_epochs") if not is_off(settings.value("max_train_epochs")) else 0
    if not settings.has("max_train_epochs"):
        epochs = 0
    is_known = all(dataset.draws is not None for dataset in datasets if dataset.subsets)
    per_epoch = batches = images = 0
    if is_known:
        batches = sum(full_and_partial_batches(each.all_draws(), each.batch_size) for each in datasets)
        images = sum(draw.number for each in datasets for draw in each.all_draws())
        per_epoch = steps_per_epoch(batches, accumulation=accumulation, processes=processes)
    if not epochs:
        steps = settings.whole("max_train_steps", 1600)
        settings.put("max_train_steps", "max_train_steps", steps, text="")
        if per_epoch:
            samples = round(steps / per_epoch * images)
            draft.set_length(
                Length(
                    steps,
                    samples,
                    per_epoch,
                    _formula(images, batches, per_epoch, accumulation=accumulation, processes=processes),
                )
            )
    elif per_epoch:
        steps = epochs * per_epoch
        formula = _formula(images, batches, per_epoch, accumulation=accumulation, processes=processes)
        draft.set_length(
            Length(steps, epochs * images, per_epoch, f"{formula}; {epochs} epochs are {steps:,} steps")
        )
        settings.put(
            "max_train_epochs", "max_train_steps", steps, text=f"{epochs} epochs of {per_epoch:,} steps."
        )
    else:
        text = (
            "The images are not here: an epoch may have other buckets, and steps, than with kohya's scripts."
        )
        settings.put("max_train_epochs", "num_train_epochs", epochs, outcome="approximate", text=text)
    if settings.has("max_train_steps"):
        settings.decide("max_train_steps", "no effect", text="max_train_epochs counts.")
    if settings.has("max_train_epochs"):
        settings.decide("max_train_epochs", "no effect", text="Off, as here.")
    for key in ("num_processes", "multi_gpu"):
        if settings.has(key):
            settings.decide(
                key, "translated", ours=f"TRAINING_NUM_PROCESSES={processes} for train.sh", text=""
            )


def _formula(images: int, batches: int, per_epoch: int, *, accumulation: int, processes: int) -> str:
    parts = f"an epoch has {counted(images, 'image')} in {counted(batches, 'batch', 'batches')}"
    shared = f", shared by {processes} processes" if processes > 1 else ""
    joined = f", {accumulation} to a step" if accumulation > 1 else ""
    return f"{parts}{shared}{joined}: {counted(per_epoch, 'step')}"

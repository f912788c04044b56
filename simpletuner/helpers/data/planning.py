"""One dataset's folder and settings to the images that are trained on, how each is cut, and its captions."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from simpletuner.helpers.configuration.schema.datasets import CaptionStrategy, DatasetConfig
from simpletuner.helpers.configuration.schema.resolution import square_size
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.buckets import Placement, bucket_size, is_too_small, place
from simpletuner.helpers.data.captions import (
    Captions,
    ambiguous_captions,
    caption_from_name,
    captions_from_file,
    shortened,
    text_file_of,
    with_instance_prompt,
)
from simpletuner.helpers.data.index import ImageIndex, ImageInfo
from simpletuner.helpers.data.sampler import shuffled
from simpletuner.helpers.data.sources import FoundFile, Scan, Skipped, scan_folder
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What is the same for every dataset of a run."""

    seed: int
    alignment: int
    """Width and height of what is encoded are multiples of this many pixels."""
    aspect_decimals: int
    """Aspects are rounded to this many decimals before buckets are made."""


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """An image that is trained on."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    sample: Sample
    """With the first caption."""
    captions: tuple[str, ...]
    """One is drawn each time the image is trained on."""


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """What one dataset contributes."""

    config: DatasetConfig
    images: tuple[PlannedImage, ...]
    """In the order of their names; never empty."""
    skipped: tuple[Skipped, ...]


def plan_dataset(config: DatasetConfig, settings: PlanSettings, *, index: ImageIndex) -> DatasetPlan:
    """Scan a dataset's folder, inspect its images and read its captions.

    What cannot be used is skipped and listed once with its reason.

    Raises:
        DataError: The folder cannot be read, no image can be used, a caption is not UTF-8 text, or two images
            claim one text file.
    """
    scan = scan_folder(config.instance_data_dir)
    strategy = _strategy(config, scan)
    _refuse_ambiguous(config, scan, strategy)
    skipped = [Skipped(config.id, printable(name), reason) for name, reason in scan.skipped]
    usable: list[tuple[FoundFile, ImageInfo, Size]] = []
    for file in _candidates(config, scan, settings.seed):
        info = index.info(file)
        reason = info.problem or _name_problem(file, strategy) or _size_problem(info.size, config)
        if info.size is None or reason is not None:
            skipped.append(Skipped(config.id, printable(file.name), reason or "its size is unknown"))
        else:
            usable.append((file, info, info.size))
        if len(usable) == config.max_num_samples:
            break
    usable.sort(key=lambda entry: entry[0].name.split("/"))
    _report_skipped(config, skipped, num_usable=len(usable))
    captions = _captions_of(config, [file for file, _, _ in usable], scan=scan, strategy=strategy)
    images = tuple(
        _planned(config, settings, file=file, info=info, size=size, captions=texts)
        for (file, info, size), texts in zip(usable, captions, strict=True)
    )
    return DatasetPlan(config=config, images=images, skipped=tuple(skipped))


def bucket_of(image_px: Size, config: DatasetConfig, settings: PlanSettings) -> Size:
    """The size at which an image of a dataset is encoded."""
    if config.crop and config.crop_aspect == "square":
        return square_size(
            resolution=config.resolution,
            resolution_type=config.resolution_type,
            alignment=settings.alignment,
        )
    return bucket_size(
        image_px,
        resolution=config.resolution,
        resolution_type=config.resolution_type,
        alignment=settings.alignment,
        aspect_decimals=settings.aspect_decimals,
    )


def _strategy(config: DatasetConfig, scan: Scan) -> CaptionStrategy:
    if config.only_instance_prompt:
        return "instanceprompt"
    return config.caption_strategy or ("textfile" if scan.captions else "filename")


def _refuse_ambiguous(config: DatasetConfig, scan: Scan, strategy: CaptionStrategy) -> None:
    if strategy != "textfile":
        return
    stems: dict[str, list[str]] = {}
    for file in scan.images:
        stems.setdefault(_stem(file), []).append(file.name)
    problems = ambiguous_captions(stems, scan.captions)
    if problems:
        raise DataError(
            f"Dataset {config.id!r} in {printable(str(config.instance_data_dir))}: {_listed(problems)}. "
            "Rename the images so that each text file belongs to one of them."
        )


def _candidates(config: DatasetConfig, scan: Scan, seed: int) -> Iterable[FoundFile]:
    """The images in the order in which they are inspected: with max_num_samples a random one."""
    if config.max_num_samples is None:
        return scan.images
    order = shuffled(seed, f"max_num_samples\x1f{config.id}", 0, length=len(scan.images))
    return (scan.images[place] for place in order)


def _name_problem(file: FoundFile, strategy: CaptionStrategy) -> str | None:
    if strategy != "filename":
        return None
    try:
        caption_from_name(file.name)
    except DataError as error:
        return str(error)
    return None


def _size_problem(size: Size | None, config: DatasetConfig) -> str | None:
    minimum = config.minimum_image_size
    if size is None or not is_too_small(size, minimum, config.resolution_type):
        return None
    meaning = {
        "pixel": "shorter edge in px",
        "area": "megapixels",
        "pixel_area": "edge in px of a square with its area",
    }[config.resolution_type]
    return (
        f"{size} px is smaller than minimum_image_size {minimum:g} ({meaning}); lower it or remove the image"
    )


def _report_skipped(config: DatasetConfig, skipped: list[Skipped], *, num_usable: int) -> None:
    for each in skipped:
        logger.warning("Dataset %s: skipped %s: %s.", config.id, each.path, each.reason)
    if num_usable == 0:
        folder = printable(str(config.instance_data_dir))
        found = _listed([f"{each.path}: {each.reason}" for each in skipped]) or "there are no images in it"
        raise DataError(
            f"Dataset {config.id!r}: no image in {folder} can be used ({found}). "
            "Put images there or correct instance_data_dir."
        )


def _captions_of(
    config: DatasetConfig, files: list[FoundFile], *, scan: Scan, strategy: CaptionStrategy
) -> list[tuple[str, ...]]:
    captions: list[tuple[str, ...]] = []
    problems: list[str] = []
    noted: dict[str, list[str]] = {}
    for file in files:
        try:
            one = _caption(config, file, scan=scan, strategy=strategy)
        except DataError as error:
            problems.append(str(error))
            continue
        if one.note is not None:
            noted.setdefault(one.note, []).append(printable(file.name))
        captions.append(one.texts)
    if problems:
        raise DataError(
            f"Dataset {config.id!r}: {len(problems)} captions cannot be used: {_listed(problems)}."
        )
    for note, names in noted.items():
        logger.warning("Dataset %s: %d captions are %s: %s.", config.id, len(names), note, _listed(names))
    return captions


def _caption(config: DatasetConfig, file: FoundFile, *, scan: Scan, strategy: CaptionStrategy) -> Captions:
    prompt = shortened((config.instance_prompt or "").strip())
    if strategy == "instanceprompt":
        return Captions(texts=(prompt,), note=None if prompt else "empty")
    if strategy == "filename":
        captions = caption_from_name(file.name)
    else:
        text_file = text_file_of(_stem(file), scan.captions)
        try:
            captions = captions_from_file(text_file)
        except DataError as error:
            where = text_file.path if text_file else file.path
            raise DataError(f"{printable(str(where))}: {error}") from error
    return with_instance_prompt(captions, prompt) if config.prepend_instance_prompt else captions


def _planned(
    config: DatasetConfig,
    settings: PlanSettings,
    *,
    file: FoundFile,
    info: ImageInfo,
    size: Size,
    captions: tuple[str, ...],
) -> PlannedImage:
    placement = _placement(config, settings, name=file.name, size=size)
    sample = Sample(
        dataset_id=config.id,
        path=printable(file.name),
        caption=captions[0],
        original_px=size,
        resized_px=placement.resized_px,
        crop_top_left=placement.top_left,
        target_px=placement.target_px,
    )
    return PlannedImage(file=file, digest=info.digest, sample=sample, captions=captions)


def _placement(config: DatasetConfig, settings: PlanSettings, *, name: str, size: Size) -> Placement:
    """Where an image is cut. A random place is drawn once for a run's seed, since latents are kept."""
    rng = Random(f"{settings.seed} crop {config.id} {name!r}")
    style = config.crop_style if config.crop else "center"
    return place(size, bucket_of(size, config, settings), style=style, rng=rng)


def _stem(file: FoundFile) -> str:
    return os.path.splitext(file.name)[0]


def _listed(texts: list[str]) -> str:
    """The first few of the texts and how many there are beyond."""
    counted = Counter(texts)
    shown = "; ".join(list(counted)[:_SHOWN])
    return shown if len(counted) <= _SHOWN else f"{shown}; and {len(counted) - _SHOWN} more"

"""One dataset's folder and settings to its usable images, each with its crop and captions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.resolution import square_size
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.buckets import bucket_size, is_too_small, place
from simpletuner.helpers.data.captions import CaptionReader, Captions, caption_reader, with_instance_prompt
from simpletuner.helpers.data.index import ImageIndex, ImageInfo
from simpletuner.helpers.data.sampler import shuffled
from simpletuner.helpers.data.scan_report import listed, report_captions, report_files
from simpletuner.helpers.data.sources import FoundFile, Scan, SkippedImage, scan_folder
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A usable image."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    sample: Sample
    """With the first caption."""
    captions: tuple[str, ...]
    """Each draw of the image takes one of them."""
    is_read_anew: bool = False
    """Whether earlier versions read other pixels from it, so that the latents they cached are stale."""


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """The images of one dataset."""

    config: DatasetConfig
    images: tuple[PlannedImage, ...]
    """In the order of their names; never empty."""
    skipped: tuple[SkippedImage, ...]


def plan_dataset(
    config: DatasetConfig, *, index: ImageIndex, seed: int, alignment: int, aspect_decimals: int
) -> DatasetPlan:
    """Scan a dataset's folder, inspect its images and read its captions; log each skipped image.

    Args:
        config: The dataset.
        index: Knows the images that earlier runs inspected.
        seed: Selects the random crops, and the images if max_num_samples is set.
        alignment: Width and height of buckets are multiples of this; pixels.
        aspect_decimals: Decimals to which aspect ratios are rounded before they are sorted into buckets.

    Raises:
        DataError: The folder cannot be read, no image can be used, a caption is not UTF-8 text, or two images
            claim one text file.
    """
    scan = scan_folder(config.instance_data_dir)
    reader = caption_reader(config, scan)
    _refuse_ambiguous(config, reader)
    report_files(config, scan, reader)
    skipped = [SkippedImage(config.id, printable(name), reason) for name, reason in scan.skipped]
    usable: list[tuple[FoundFile, ImageInfo, Size]] = []
    for file in candidates(config, scan, seed):
        info = index.info(file)
        reason = reader.unusable(file) or _size_problem(info.size, config)
        if info.size is None or reason is not None:
            why = info.problem or reason or "its size is unknown"
            skipped.append(SkippedImage(config.id, printable(file.name), why))
        else:
            usable.append((file, info, info.size))
        if len(usable) == config.max_num_samples:
            break
    # After max_num_samples: the run that found the damage did not take another image either.
    skipped += [
        SkippedImage(config.id, printable(file.name), info.problem)
        for file, info, _ in usable
        if info.problem
    ]
    usable = [entry for entry in usable if entry[1].problem is None]
    usable.sort(key=lambda entry: entry[0].name.split("/"))
    left_out = _left_out(config, scan)
    _report_skipped(config, skipped, num_usable=len(usable), left_out=left_out)
    skipped += left_out
    files = [file for file, _, _ in usable]
    captions = _captions_of(config, files, reader=reader)
    report_captions(config, files, captions, reader=reader)
    style = config.crop_style if config.crop else "center"
    images = []
    for (file, info, size), one in zip(usable, captions, strict=True):
        target_px = bucket_of(size, config, alignment=alignment, aspect_decimals=aspect_decimals)
        # Drawn once for a seed, because latents are cached.
        rng = Random(f"{seed} crop {config.id} {file.name!r}")
        placement = place(size, target_px, style=style, rng=rng)
        sample = Sample(
            dataset_id=config.id,
            path=printable(file.name),
            caption=one.texts[0],
            original_px=size,
            resized_px=placement.resized_px,
            crop_top_left=placement.top_left,
            target_px=target_px,
        )
        images.append(
            PlannedImage(
                file=file,
                digest=info.digest,
                sample=sample,
                captions=one.texts,
                is_read_anew=info.is_read_anew,
            )
        )
    return DatasetPlan(config=config, images=tuple(images), skipped=tuple(skipped))


def without_damaged(plan: DatasetPlan, damaged: Mapping[str, str]) -> DatasetPlan:
    """The plan without the images whose pixels turned out to be damaged; log each of them.

    Args:
        plan: Made before the images were decoded.
        damaged: The digest of an image -> the reason.

    Raises:
        DataError: No image is left.
    """
    kept = tuple(image for image in plan.images if image.digest not in damaged)
    skipped = [
        SkippedImage(plan.config.id, image.sample.path, damaged[image.digest])
        for image in plan.images
        if image.digest in damaged
    ]
    _report_skipped(plan.config, skipped, num_usable=len(kept))
    return replace(plan, images=kept, skipped=(*plan.skipped, *skipped))


def bucket_of(image_px: Size, config: DatasetConfig, *, alignment: int, aspect_decimals: int) -> Size:
    """The bucket of an image: the size at which it is encoded."""
    resolution, resolution_type = config.resolution, config.resolution_type
    if config.crop and config.crop_aspect == "square":
        return square_size(resolution=resolution, resolution_type=resolution_type, alignment=alignment)
    return bucket_size(
        image_px,
        resolution=resolution,
        resolution_type=resolution_type,
        alignment=alignment,
        aspect_decimals=aspect_decimals,
    )


def _refuse_ambiguous(config: DatasetConfig, reader: CaptionReader) -> None:
    problems = reader.conflicts()
    if problems:
        raise DataError(
            f"Dataset {config.id!r} in {printable(str(config.instance_data_dir))}: {listed(problems)}. "
            "Rename the images so that each text file belongs to one of them."
        )


def _left_out(config: DatasetConfig, scan: Scan) -> list[SkippedImage]:
    """Images in formats that are not read here, and text files without an image."""
    reasons = [*scan.unread, *((file.name, "no image has its name") for file in scan.orphans())]
    return [SkippedImage(config.id, printable(name), reason) for name, reason in reasons]


def candidates(config: DatasetConfig, scan: Scan, seed: int) -> Iterable[FoundFile]:
    """The images in the order of inspection: random if max_num_samples is set."""
    if config.max_num_samples is None:
        return scan.images
    order = shuffled(seed, f"max_num_samples\x1f{config.id}", 0, length=len(scan.images))
    return (scan.images[position] for position in order)


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


def _report_skipped(
    config: DatasetConfig,
    skipped: list[SkippedImage],
    *,
    num_usable: int,
    left_out: Sequence[SkippedImage] = (),
) -> None:
    """Log each skipped image; files left out by their names are in the error only."""
    for each in skipped:
        logger.warning("Dataset %s: skipped %s: %s.", config.id, each.path, each.reason)
    if num_usable == 0:
        folder = printable(str(config.instance_data_dir))
        reasons = [f"{each.path}: {each.reason}" for each in (*skipped, *left_out)]
        found = listed(reasons) or "there are no images in it"
        raise DataError(
            f"Dataset {config.id!r}: no image in {folder} can be used ({found}). "
            "Put images there or correct instance_data_dir."
        )


def _captions_of(config: DatasetConfig, files: list[FoundFile], *, reader: CaptionReader) -> list[Captions]:
    captions: list[Captions] = []
    problems: list[str] = []
    for file in files:
        try:
            one = reader.read(file)
        except DataError as error:
            problems.append(str(error))
            continue
        prepends = config.prepend_instance_prompt and reader.can_prepend
        captions.append(with_instance_prompt(one, reader.instance_prompt) if prepends else one)
    if problems:
        raise DataError(
            f"Dataset {config.id!r}: {len(problems)} captions cannot be used: {listed(problems)}."
        )
    return captions

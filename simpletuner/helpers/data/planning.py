"""One dataset's folder and settings to its usable images, each with its crop and captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.buckets import Placement
from simpletuner.helpers.data.caption_variants import CaptionPlan, limit_problem
from simpletuner.helpers.data.captions import CaptionReader, Captions, caption_reader, read_captions
from simpletuner.helpers.data.conditioning import Conditioning, ConditioningFinder
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.data.index import ImageIndex, ImageInfo
from simpletuner.helpers.data.masks import BLANK, MaskKind, mask_key
from simpletuner.helpers.data.references import PlannedReference, bucket_name
from simpletuner.helpers.data.sampler import shuffled
from simpletuner.helpers.data.scan_report import listed, report_captions, report_downsampled, report_files
from simpletuner.helpers.data.sources.base import FoundFile, Scan, SkippedImage
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedMask:
    """The mask of a usable image."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    kind: MaskKind
    key: str
    """Of its entry in the cache of latents."""


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A usable image."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    sample: Sample
    """With the first variant of the first caption."""
    captions: tuple[tuple[str, ...], ...]
    """The variants of each caption; each draw of the image takes one of one."""
    content: str
    """Identity of its pixels, for the keys of cached latents."""
    mask: PlannedMask | None = None
    references: tuple[PlannedReference, ...] = ()
    """One of each entry of references, in the order of conditioning_data, then those that are made."""

    @property
    def bucket(self) -> str:
        """The bucket within its dataset."""
        return bucket_name(self.sample.target_px, [each.sample.target_px for each in self.references])

    def fault(self, damaged: Mapping[str, str]) -> str | None:
        """The reason if it, its mask or a reference is damaged; by digests, and keys of masks."""
        ids = [self.digest, *(each.digest for each in self.references)]
        ids += [] if self.mask is None else [self.mask.digest, self.mask.key]
        return next((damaged[each] for each in ids if each in damaged), None)


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """The images of one dataset."""

    config: DatasetConfig
    caption_plan: CaptionPlan
    images: tuple[PlannedImage, ...]
    """In the order of their names; never empty."""
    skipped: tuple[SkippedImage, ...]


@dataclass(frozen=True, slots=True)
class _Usable:
    file: FoundFile
    info: ImageInfo
    size: Size
    placement: Placement
    conditioning: Conditioning

    @property
    def problem(self) -> str | None:
        """The reason if an earlier run found its pixels, or those of what conditions it, damaged."""
        return self.info.problem or self.conditioning.problem


def plan_dataset(
    config: DatasetConfig,
    *,
    index: ImageIndex,
    seed: int,
    alignment: int,
    aspect_decimals: int,
    caption_plan: CaptionPlan,
    conditioning: ConditioningFinder | None = None,
    is_known_blank: Callable[[PlannedMask], bool] | None = None,
) -> DatasetPlan:
    """Scan a dataset's folder, inspect its images and read its captions; log each skipped image.

    Args:
        config: The dataset.
        index: Knows the images that earlier runs inspected.
        seed: Selects the random crops and shapes, and the images if max_num_samples is set.
        alignment: Width and height of buckets are multiples of this; pixels.
        aspect_decimals: Decimals to which aspect ratios are rounded before they are sorted into buckets.
        caption_plan: What becomes of the captions.
        conditioning: Finds the mask and the references of each image; None without them.
        is_known_blank: Whether a mask is known to leave nothing of its image.

    Raises:
        DataError: The folder cannot be read, no image can be used, a caption is not UTF-8 text, two images
            claim one text file, no caption has tags to shuffle, there are too many variants, or an image has
            no mask or reference, several, or one of another aspect ratio.
    """
    scan = scan_entry(config, cache=index.folder)
    reader = caption_reader(config, scan)
    _refuse_ambiguous(config, reader)
    report_files(config, scan, reader)
    skipped = [SkippedImage(config.id, printable(name), reason) for name, reason in scan.skipped]
    cropping = Cropping(config=config, seed=seed, alignment=alignment, aspect_decimals=aspect_decimals)
    usable: list[_Usable] = []
    index.expect(islice(candidates(config, scan, seed), config.max_num_samples))
    for file in candidates(config, scan, seed):
        info = index.info(file)
        reason, found = reader.unusable(file), _placement(info.size, cropping, file)
        if info.size is None or reason is not None or isinstance(found, str):
            why = info.problem or reason or str(found)
            skipped.append(SkippedImage(config.id, printable(file.name), why))
        else:
            own: Conditioning | str = Conditioning()
            if conditioning is not None:
                own = conditioning.conditioning_of(file, info, placement=found, cropping=cropping)
            if isinstance(own, str):
                skipped.append(SkippedImage(config.id, printable(file.name), own))
            else:
                usable.append(_Usable(file, info, info.size, found, own))
        if len(usable) == config.max_num_samples:
            break
    if conditioning is not None and (problem := conditioning.problem()):
        raise DataError(problem)
    # After max_num_samples: the run that found the damage did not take another image either.
    skipped += [
        SkippedImage(config.id, printable(each.file.name), each.problem) for each in usable if each.problem
    ]
    usable = [each for each in usable if each.problem is None]
    usable.sort(key=lambda each: each.file.name.split("/"))
    left_out = _left_out(config, scan)
    _report_skipped(config, skipped, num_usable=len(usable), left_out=left_out)
    skipped += left_out
    files = [each.file for each in usable]
    captions = _captions_of(config, files, reader=reader)
    report_captions(config, files, captions, reader=reader)
    report_downsampled(config, sum(cropping.is_downsampled(each.size) for each in usable), len(usable))
    _check_captions(files, captions, caption_plan)
    images = [
        _planned(config, each, caption_plan.variants(one.texts, image=each.file.name))
        for each, one in zip(usable, captions, strict=True)
    ]
    plan = DatasetPlan(config=config, caption_plan=caption_plan, images=tuple(images), skipped=tuple(skipped))
    if is_known_blank is None:
        return plan
    known = [image.mask for image in images if image.mask is not None]
    blank = {each.key: BLANK for each in known if is_known_blank(each)}
    return without_damaged(plan, blank)


def without_damaged(plan: DatasetPlan, damaged: Mapping[str, str]) -> DatasetPlan:
    """The plan without the images whose pixels turned out to be damaged; log each of them.

    Args:
        plan: Made before the images were decoded.
        damaged: The digest of an image, a mask or a reference, or the key of a mask -> the reason.

    Raises:
        DataError: No image is left.
    """
    faults = [(image, image.fault(damaged)) for image in plan.images]
    kept = tuple(image for image, fault in faults if fault is None)
    skipped = [
        SkippedImage(plan.config.id, image.sample.path, fault) for image, fault in faults if fault is not None
    ]
    _report_skipped(plan.config, skipped, num_usable=len(kept))
    return replace(plan, images=kept, skipped=(*plan.skipped, *skipped))


def _placement(size: Size | None, cropping: Cropping, file: FoundFile) -> Placement | str:
    """The resize and the crop of an image, or the reason why its size cannot be used."""
    return "its size is unknown" if size is None else cropping.placement(size, name=file.name)


def _check_captions(
    files: Sequence[FoundFile], captions: Sequence[Captions], caption_plan: CaptionPlan
) -> None:
    """Refuse more variants than can be encoded, and tags that no caption has; log captions without tags."""
    dataset = caption_plan.config.id
    number = caption_plan.num_variants
    if number > 1 and (
        problem := limit_problem({dataset: number * sum(len(each.texts) for each in captions)})
    ):
        raise DataError(problem)
    named = zip((file.name for file in files), (each.texts[0] for each in captions), strict=True)
    problems = caption_plan.tag_problems(named)
    if problems.is_error:
        raise DataError(f"Dataset {dataset!r}: {'; '.join(problems.lines())}.")
    for line in problems.lines():
        logger.warning("Dataset %s: %s.", dataset, line)


def _planned(config: DatasetConfig, image: _Usable, captions: tuple[tuple[str, ...], ...]) -> PlannedImage:
    sample = Sample(
        dataset_id=config.id,
        path=printable(image.file.name),
        caption=captions[0][0],
        original_px=image.size,
        resized_px=image.placement.resized_px,
        crop_top_left=image.placement.top_left,
        target_px=image.placement.target_px,
    )
    mask = image.conditioning.mask
    return PlannedImage(
        file=image.file,
        digest=image.info.digest,
        sample=sample,
        captions=captions,
        content=image.info.content,
        mask=None if mask is None else PlannedMask(mask.file, mask.digest, mask.kind, mask_key(mask, sample)),
        references=image.conditioning.references,
    )


def _refuse_ambiguous(config: DatasetConfig, reader: CaptionReader) -> None:
    problems = reader.conflicts()
    if problems:
        raise DataError(
            f"Dataset {config.id!r} in {config.place}: {listed(problems)}. "
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
        reasons = [f"{each.path}: {each.reason}" for each in (*skipped, *left_out)]
        found = listed(reasons) or "there are no images in it"
        raise DataError(
            f"Dataset {config.id!r}: no image in {config.place} can be used ({found}). "
            "Put images there or correct instance_data_dir."
        )


def _captions_of(config: DatasetConfig, files: list[FoundFile], *, reader: CaptionReader) -> list[Captions]:
    captions: list[Captions] = []
    problems: list[str] = []
    reader.expect(files)
    for file in files:
        try:
            captions.append(read_captions(file, config, reader))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(
            f"Dataset {config.id!r}: {len(problems)} captions cannot be used: {listed(problems)}."
        )
    return captions

"""One dataset's folder and settings to its usable images, each with its crop and captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.buckets import placement_of
from simpletuner.helpers.data.caption_variants import CaptionPlan, limit_problem
from simpletuner.helpers.data.captions import CaptionColumn, CaptionReader, caption_reader, read_caption_rows
from simpletuner.helpers.data.columns import Rows, Texts, is_everything
from simpletuner.helpers.data.conditioning import Conditioning, ConditioningFinder
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.data.index import ImageIndex, Infos, joined_infos
from simpletuner.helpers.data.masks import BLANK, FoundMask, mask_key
from simpletuner.helpers.data.planned import CaptionTexts, DatasetPlan, PlannedImages, PlannedMask, Variants
from simpletuner.helpers.data.sampler import inspection_order
from simpletuner.helpers.data.scan_report import listed, report_captions, report_downsampled, report_files
from simpletuner.helpers.data.sources.base import Files, Scan, SkippedImage
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Usable:
    """The usable images found so far, as columns."""

    rows: Rows
    """Positions in the scan."""
    infos: Infos
    """Of these images."""
    cuts: npt.NDArray[np.int32]
    """[n, 6], as `Cropping.placements` gives them."""
    conditioning: list[Conditioning]
    """Of each image; empty if nothing conditions them."""

    def take(self, places: Rows) -> _Usable:
        """Those at some places."""
        if is_everything(places, len(self.rows)):
            return self
        conditioning = [self.conditioning[place] for place in places.tolist()] if self.conditioning else []
        return _Usable(self.rows[places], self.infos.take(places), self.cuts[places], conditioning)

    def problems(self) -> dict[int, str]:
        """Place -> the reason if an earlier run found the pixels, or those of what conditions it, damaged."""
        conditioned = {place: each.problem for place, each in enumerate(self.conditioning) if each.problem}
        return {**conditioned, **self.infos.problems}


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
    scan = scan_entry(config, cache=index.folder, is_read_only=index.is_read_only)
    reader = caption_reader(config, scan, recall=index.texts)
    _refuse_ambiguous(config, reader)
    report_files(config, scan, reader)
    skipped = [SkippedImage(config.id, printable(name), reason) for name, reason in scan.skipped]
    cropping = Cropping(config=config, seed=seed, alignment=alignment, aspect_decimals=aspect_decimals)
    inspection = _Inspection(config, scan, reader, index=index, cropping=cropping, conditioning=conditioning)
    found = inspection.usable(inspection_order(config, len(scan.images), seed))
    skipped += inspection.skipped
    if conditioning is not None and (problem := conditioning.problem()):
        raise DataError(problem)
    # After max_num_samples: the run that found the damage did not take another image either.
    problems = found.problems()
    names = scan.images.names
    skipped += [
        SkippedImage(config.id, printable(names[int(found.rows[place])]), problems[place])
        for place in sorted(problems)
    ]
    whole = np.delete(np.arange(len(found.rows)), sorted(problems))
    found = found.take(whole[np.argsort(found.rows[whole])])  # the scan is in the order of the names
    left_out = _left_out(config, scan)
    _report_skipped(config, skipped, num_usable=len(found.rows), left_out=left_out)
    skipped += left_out
    captions = _captions_of(config, found.rows, reader=reader)
    files = scan.images.take(found.rows)
    report_captions(config, files.names, captions, reader=reader)
    _report_downsampled(config, found, cropping)
    _check_captions(files.names, captions, caption_plan)
    images = _planned(config, found, files, captions=captions, caption_plan=caption_plan)
    plan = DatasetPlan(config=config, caption_plan=caption_plan, images=images, skipped=tuple(skipped))
    if is_known_blank is None or images.masks is None:
        return plan
    blank = {each.key: BLANK for each in images.masks if each is not None and is_known_blank(each)}
    return without_damaged(plan, blank)


def without_damaged(plan: DatasetPlan, damaged: Mapping[str, str]) -> DatasetPlan:
    """The plan without the images whose pixels turned out to be damaged; log each of them.

    Args:
        plan: Made before the images were decoded.
        damaged: The digest of an image, a mask or a reference, or the key of a mask -> the reason.

    Raises:
        DataError: No image is left.
    """
    faults = plan.images.faults(damaged)
    if not faults:
        return plan
    kept = plan.images.take(np.delete(np.arange(len(plan.images)), list(faults)))
    skipped = [
        SkippedImage(plan.config.id, plan.images.sample(row).path, fault)
        for row, fault in sorted(faults.items())
    ]
    _report_skipped(plan.config, skipped, num_usable=len(kept))
    return replace(plan, images=kept, skipped=(*plan.skipped, *skipped))


class _Inspection:
    """Finds the usable images of a scan, and notes why the others are not."""

    def __init__(
        self,
        config: DatasetConfig,
        scan: Scan,
        reader: CaptionReader,
        *,
        index: ImageIndex,
        cropping: Cropping,
        conditioning: ConditioningFinder | None,
    ) -> None:
        self._config, self._scan, self._reader = config, scan, reader
        self._index, self._cropping = index, cropping
        self._conditioning = conditioning if conditioning is not None and conditioning.finds else None
        self.skipped: list[SkippedImage] = []

    def usable(self, rows: Rows) -> _Usable:
        """The usable ones of the images at these positions, up to max_num_samples."""
        limit = self._config.max_num_samples
        if limit is None:
            return self._inspected(rows)
        parts = [self._inspected(rows[:0])]
        # No image beyond the limit is inspected: each round takes as many as are wanting.
        while len(rows) and (wanting := limit - sum(len(part.rows) for part in parts)) > 0:
            # In the order of the names: a parquet file is read forward.
            parts.append(self._inspected(np.sort(rows[:wanting])))
            rows = rows[wanting:]
        return _concatenated(parts)

    def _inspected(self, rows: Rows) -> _Usable:
        files = self._scan.images.take(rows)
        infos = self._index.infos(files)
        reasons = self._reader.unusable_rows(files)
        (sized,) = np.nonzero(infos.sizes[:, 0])
        cuts, problems = self._cropping.placements(infos.sizes[sized], files.names.take(sized))
        reasons = {**{int(sized[place]): why for place, why in problems.items()}, **reasons}
        has_size = np.zeros(len(rows), bool)
        has_size[sized] = True
        for place in np.flatnonzero(~has_size).tolist():
            reasons[place] = infos.problems[place]
        reasons |= {place: infos.problems[place] for place in reasons.keys() & infos.problems.keys()}
        all_cuts = np.zeros((len(rows), 6), np.int32)
        all_cuts[sized] = cuts
        found = _Usable(rows, infos, all_cuts, [])
        if self._conditioning is not None:
            found = self._conditioned(found, files, reasons)
        for place, reason in sorted(reasons.items()):
            self.skipped.append(SkippedImage(self._config.id, printable(files.names[place]), reason))
        return found.take(np.delete(np.arange(len(rows)), sorted(reasons)))

    def _conditioned(self, found: _Usable, files: Files, reasons: dict[int, str]) -> _Usable:
        """The images with what conditions them; adds the reasons why some cannot be used."""
        assert self._conditioning is not None, "something conditions them"
        conditioning = [Conditioning()] * len(files)
        for place, (file, cut) in enumerate(zip(files, found.cuts.tolist(), strict=True)):
            if place in reasons:
                continue
            own = self._conditioning.conditioning_of(
                file, found.infos.at(place), placement=placement_of(cut), cropping=self._cropping
            )
            if isinstance(own, str):
                reasons[place] = own
            else:
                conditioning[place] = own
        return replace(found, conditioning=conditioning)


def _concatenated(parts: Sequence[_Usable]) -> _Usable:
    return _Usable(
        np.concatenate([each.rows for each in parts]),
        joined_infos([each.infos for each in parts]),
        np.concatenate([each.cuts for each in parts]),
        [own for each in parts for own in each.conditioning],
    )


def _report_downsampled(config: DatasetConfig, found: _Usable, cropping: Cropping) -> None:
    if config.downsampling is None:
        return
    sizes, numbers = np.unique(found.infos.sizes, axis=0, return_counts=True)
    number = sum(
        count
        for (height, width), count in zip(sizes.tolist(), numbers.tolist(), strict=True)
        if cropping.is_downsampled(Size(height, width))
    )
    report_downsampled(config, number, len(found.rows))


def _check_captions(names: Texts, captions: CaptionColumn, caption_plan: CaptionPlan) -> None:
    """Refuse more variants than can be encoded, and tags that no caption has; log captions without tags."""
    dataset = caption_plan.config.id
    number = caption_plan.num_variants
    if number > 1 and (problem := limit_problem({dataset: number * captions.num_texts})):
        raise DataError(problem)
    problems = caption_plan.tag_problems(zip(names, captions.firsts, strict=True))
    if problems.is_error:
        raise DataError(f"Dataset {dataset!r}: {'; '.join(problems.lines())}.")
    for line in problems.lines():
        logger.warning("Dataset %s: %s.", dataset, line)


def _planned(
    config: DatasetConfig,
    found: _Usable,
    files: Files,
    *,
    captions: CaptionColumn,
    caption_plan: CaptionPlan,
) -> PlannedImages:
    images = PlannedImages(
        dataset_id=config.id,
        files=files,
        digests=found.infos.digests,
        is_read_anew=found.infos.is_read_anew,
        cuts=np.concatenate([found.infos.sizes, found.cuts], axis=1),
        captions=_caption_texts(files.names, captions, caption_plan),
        references=[each.references for each in found.conditioning]
        if any(each.references for each in found.conditioning)
        else None,
    )
    if not any(each.mask for each in found.conditioning):
        return images
    masks = [_planned_mask(each.mask, images.sample(row)) for row, each in enumerate(found.conditioning)]
    return replace(images, masks=masks)


def _planned_mask(mask: FoundMask | None, sample: Sample) -> PlannedMask | None:
    if mask is None:
        return None
    return PlannedMask(mask.file, mask.digest, mask.kind, mask_key(mask, sample))


def _caption_texts(names: Texts, captions: CaptionColumn, caption_plan: CaptionPlan) -> CaptionTexts:
    """What becomes of the captions."""
    ones = captions.firsts
    several: dict[int, Variants] = {
        row: tuple((text,) for text in texts) for row, texts in captions.several.items()
    }
    if caption_plan.changes:
        ones = []
        for row, name in enumerate(names):
            variants = caption_plan.variants(captions.texts_of(row), image=name)
            ones.append(variants[0][0])
            if len(variants) > 1 or len(variants[0]) > 1:
                several[row] = variants
    return CaptionTexts(Texts.of(ones), several)


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


def _captions_of(config: DatasetConfig, rows: Rows, *, reader: CaptionReader) -> CaptionColumn:
    captions, problems = read_caption_rows(rows, config, reader)
    if problems:
        raise DataError(
            f"Dataset {config.id!r}: {len(problems)} captions cannot be used: {listed(problems)}."
        )
    return captions

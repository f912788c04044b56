"""What a dataset will give to training, from its file names and image headers. Imports no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.caption_variants import CaptionPlan, TagProblems, caption_plan
from simpletuner.helpers.data.captions import CaptionReader, caption_reader, read_captions, strategy_of
from simpletuner.helpers.data.conditioning import ConditioningFinder, Entry
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.data.held_out import is_held_out
from simpletuner.helpers.data.images import inspect_image
from simpletuner.helpers.data.index import ImageIndex, index_file
from simpletuner.helpers.data.references import bucket_name
from simpletuner.helpers.data.sampler import inspection_order
from simpletuner.helpers.data.scan_report import listed, unread_tables
from simpletuner.helpers.data.sources.base import FoundFile, Scan
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError, LoaderTimeoutError, UnreachableError
from simpletuner.helpers.io.names import printable

MOST_HEADERS = 2000
LONGEST_S = 2.0
LONGEST_REMOTE_S = 30.0
"""For images in remote storage: the listing, the headers and the captions."""


@dataclass(frozen=True, slots=True)
class PreviewedImage:
    """An image that can be used."""

    name: str
    digest: str
    """Of its bytes, in hexadecimal digits."""
    group: str
    """Its bucket, with the sizes of its references if they differ from its own."""
    reference_captions: tuple[str, ...]
    """Stand for its own where it is trained with a reference that has some."""


@dataclass(frozen=True, kw_only=True)
class DatasetPreview:
    """The images of one dataset, as far as they were read."""

    config: DatasetConfig
    conditioning: tuple[Entry, ...]
    """The entries of its masks and references."""
    num_images: int
    """Files that have an image's name, or max_num_samples of them."""
    num_read: int
    """Files of which the header was read."""
    buckets: Counter[Size]
    """Size -> number of the images read."""
    enlarged: tuple[str, ...]
    """Names of the images read that are smaller than their bucket."""
    num_downsampled: int
    """Images read that are resized to target_downsample_size before their crop."""
    problems: tuple[str, ...]
    """One sentence for each image read that cannot be used, and each caption."""
    captions: str
    """Source of the captions."""
    num_uncaptioned: int
    example: tuple[str, str] | None
    """Name and caption of an image, changed as the run changes it."""
    caption_plan: CaptionPlan
    """What becomes of the captions."""
    texts: Mapping[str, tuple[str, ...]]
    """Name of an image that was read -> its captions as they were read."""
    num_captions: int
    """Captions of the images read, each variant counted."""
    tags: TagProblems
    """Captions of the images read whose tags stay as they are."""
    conditioning_problem: str | None = None
    """Masks and references that the images read lack, or that do not fit them."""
    trained: tuple[PreviewedImage, ...]
    """Images read that are trained."""
    held_out: tuple[PreviewedImage, ...]
    """Images read that this dataset holds out."""
    num_copies: int = 0
    """Images read that are not trained because another dataset holds out the same bytes."""
    unreachable: str | None = None
    """The reason if the images are in storage that does not answer; then nothing was read."""

    @property
    def is_whole(self) -> bool:
        """Whether every image was read."""
        return self.num_read == self.num_images

    @cached_property
    def groups(self) -> Counter[str]:
        """The number of trained images in each group."""
        return Counter(each.group for each in self.trained)

    @property
    def num_variants(self) -> int:
        """Variants of each caption."""
        return self.caption_plan.num_variants

    def trained_captions(self) -> Iterator[str]:
        """Every variant of the captions of the images read that are trained; those of references too."""
        for image in self.trained:
            texts = self.texts.get(image.name, ())
            yield from chain(*self.caption_plan.variants(texts, image=image.name), image.reference_captions)

    @property
    def num_trained(self) -> int:
        """Images read that are trained."""
        return len(self.trained)

    @property
    def num_held_out(self) -> int:
        """Images read that this dataset holds out."""
        return len(self.held_out)

    @property
    def expected_trained(self) -> int:
        """All images that are trained: of those read, in proportion."""
        return self._in_proportion(self.num_trained)

    @property
    def expected_held_out(self) -> int:
        """All images that are held out: of those read, in proportion."""
        return self._in_proportion(self.num_held_out)

    @property
    def expected_captions(self) -> int:
        """Captions of all images, each variant counted: those of the images read, in proportion."""
        return self._in_proportion(self.num_captions)

    def _in_proportion(self, number: int) -> int:
        return round(number * self.num_images / max(1, self.num_read))


def without_copies(previews: Sequence[DatasetPreview]) -> list[DatasetPreview]:
    """The datasets without the trained images whose bytes another one holds out, as the run leaves them out.

    Of a dataset that was not read whole, the copies of the images that were not read stay.
    """
    held_out = {image.digest for each in previews for image in each.held_out}
    kept = [tuple(image for image in each.trained if image.digest not in held_out) for each in previews]
    return [
        replace(each, trained=images, num_copies=len(each.trained) - len(images))
        for each, images in zip(previews, kept, strict=True)
    ]


def preview(
    config: DatasetConfig,
    data: DataConfig,
    *,
    alignment: int,
    seed: int,
    reads_all: bool,
    conditioning: Sequence[Entry] = (),
) -> DatasetPreview:
    """Read the headers of a dataset's images: 2,000 at most and for 2 s at most, beside those in the index.

    Images in remote storage that does not answer in 30 s are left out.

    Args:
        config: The dataset.
        data: The run's defaults.
        alignment: Width and height of buckets are multiples of this; pixels.
        seed: Selects the random shapes of crops, and the images if max_num_samples is set.
        reads_all: Read every image, however long it takes.
        conditioning: The entries that the dataset's conditioning_data names.

    Raises:
        DataError: The place of the images cannot be read, or holds none.
        SourceError: Remote storage refuses.
        MissingDependencyError: The package of the storage is not installed.
    """
    read = partial(
        _read, config, data, alignment=alignment, seed=seed, reads_all=reads_all, conditioning=conditioning
    )
    # The rows of a table may name URLs.
    if all(IMAGE_SOURCES[each.source].needs_folder for each in (config, *conditioning)):
        return read()
    # Imported late: most datasets are local, and validate imports little.
    from simpletuner.helpers.caching.prefetch import LoaderWatch, prefetch

    watch = LoaderWatch(timeout_s=0 if reads_all else LONGEST_REMOTE_S)
    try:
        return next(prefetch([read], lambda work: work(), watch=watch))
    except LoaderTimeoutError:
        return _unread(config, data, seed=seed, reason=f"it takes longer than {LONGEST_REMOTE_S:g} s.")
    except UnreachableError as error:
        return _unread(config, data, seed=seed, reason=str(error))


def _unread(config: DatasetConfig, data: DataConfig, *, seed: int, reason: str) -> DatasetPreview:
    """A dataset of which nothing is known."""
    changes = caption_plan(config, data, seed=seed, caption_dropout=0)
    return DatasetPreview(
        config=config,
        conditioning=(),
        num_images=0,
        num_read=0,
        buckets=Counter(),
        enlarged=(),
        num_downsampled=0,
        problems=(),
        captions="",
        num_uncaptioned=0,
        example=None,
        caption_plan=changes,
        texts={},
        num_captions=0,
        tags=changes.tag_problems([]),
        trained=(),
        held_out=(),
        unreachable=reason,
    )


def _read(
    config: DatasetConfig,
    data: DataConfig,
    *,
    alignment: int,
    seed: int,
    reads_all: bool,
    conditioning: Sequence[Entry],
) -> DatasetPreview:
    scan = scan_entry(config, cache=data.latents_folder(config))
    if not scan.images:
        reasons = listed(f"{printable(name)}: {reason}" for name, reason in scan.skipped)
        why = f" ({reasons})" if reasons else ""
        raise DataError(
            f"Dataset {config.id!r}: {config.place} holds no image{why}. Put images there or correct "
            "instance_data_dir."
        )
    reader = caption_reader(config, scan)
    index = ImageIndex(index_file(data.latents_folder(config), config))
    order = np.sort(inspection_order(config, len(scan.images), seed)[: config.max_num_samples])
    found = scan.images.take(order)
    buckets: Counter[Size] = Counter()
    trained: list[PreviewedImage] = []
    held_out: list[PreviewedImage] = []
    enlarged: list[str] = []
    problems = [f"{name}: {reason}" for name, reason in scan.skipped] + reader.conflicts()
    if tables := unread_tables(config, scan, reader):
        problems.append(
            f"{listed(map(printable, tables))}: not read, as captions come from {strategy_of(config, scan)}. "
            'Set caption_strategy to "metadata" to train what it holds'
        )
    usable: list[FoundFile] = []
    num_read = num_downsampled = 0
    cropping = Cropping(
        config=config, seed=seed, alignment=alignment, aspect_decimals=data.aspect_bucket_rounding
    )
    folder = data.latents_folder(config)
    finder = ConditioningFinder(
        config, conditioning, index_of=lambda entry: ImageIndex(index_file(folder, entry))
    )
    index.expect(found)
    for file in found if reads_all else _within_limits(found, index):
        num_read += 1
        info = index.info(file)
        reason = info.problem or reader.unusable(file)
        if info.size is None or reason is not None:
            problems.append(f"{printable(file.name)}: {reason}")
            continue
        placement = cropping.placement(info.size, name=file.name)
        if isinstance(placement, str):
            problems.append(f"{printable(file.name)}: {placement}")
            continue
        own = finder.conditioning_of(file, info, placement=placement, cropping=cropping)
        if isinstance(own, str):
            problems.append(f"{printable(file.name)}: {own}")
            continue
        usable.append(file)
        buckets[placement.target_px] += 1
        group = bucket_name(placement.target_px, [each.sample.target_px for each in own.references])
        part = held_out if is_held_out(config, info.digest) else trained
        others = tuple(text for each in own.references for text in each.captions)
        part.append(PreviewedImage(file.name, info.digest, group, others))
        num_downsampled += cropping.is_downsampled(info.size)
        resized = placement.resized_px
        if resized.width > info.size.width or resized.height > info.size.height:
            enlarged.append(printable(file.name))
    texts = _captions(usable, config, reader, problems=problems)
    changes = caption_plan(config, data, seed=seed, caption_dropout=0)
    firsts = [(name, captions[0]) for name, captions in texts]
    example = next(
        (
            (printable(name), changes.variants(captions, image=name)[0][0])
            for name, captions in texts
            if captions[0]
        ),
        None,
    )
    return DatasetPreview(
        config=config,
        conditioning=tuple(conditioning),
        num_images=len(found),
        num_read=num_read,
        buckets=buckets,
        enlarged=tuple(enlarged),
        num_downsampled=num_downsampled,
        problems=tuple(problems),
        captions=_source(config, scan),
        num_uncaptioned=sum(not text for _, text in firsts),
        example=example,
        caption_plan=changes,
        texts=dict(texts),
        num_captions=changes.num_variants * sum(len(captions) for _, captions in texts),
        tags=changes.tag_problems(firsts),
        conditioning_problem=finder.problem(),
        trained=tuple(trained),
        held_out=tuple(held_out),
    )


def header_size(file: Path) -> Size | None:
    """The size of an image from its header, EXIF orientation applied; None if it cannot be used."""
    try:
        return inspect_image(file.read_bytes())
    except (DataError, OSError):
        return None


def _within_limits(files: Sequence[FoundFile], index: ImageIndex) -> Iterator[FoundFile]:
    started_s, num_unknown = time.monotonic(), 0
    for file in files:
        num_unknown += not index.knows(file)
        if num_unknown > MOST_HEADERS or time.monotonic() - started_s > LONGEST_S:
            return
        yield file


def _captions(
    files: list[FoundFile], config: DatasetConfig, reader: CaptionReader, *, problems: list[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """Name and captions of each image; notes the captions that cannot be used."""
    captions: list[tuple[str, tuple[str, ...]]] = []
    reader.expect(files)
    for file in files:
        try:
            captions.append((file.name, read_captions(file, config, reader).texts))
        except DataError as error:
            problems.append(str(error))
    return captions


def _source(config: DatasetConfig, scan: Scan) -> str:
    chosen = config.caption_strategy is None and not config.only_instance_prompt
    return f"{strategy_of(config, scan)}{', as caption_strategy is not set' if chosen else ''}"

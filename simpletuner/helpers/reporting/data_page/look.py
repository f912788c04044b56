"""Plans the data of a configuration as training does, and measures every image of it. Imports no torch."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from rich.progress import track

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.data.caption_variants import caption_plan
from simpletuner.helpers.data.conditioning import ConditioningFinder, entries_of
from simpletuner.helpers.data.held_out import all_held_out, is_held_out
from simpletuner.helpers.data.index import ImageIndex, index_file
from simpletuner.helpers.data.phases import Calendar, DatasetBuckets, buckets_of, calendar_of
from simpletuner.helpers.data.planned import DatasetPlan, PlannedImage
from simpletuner.helpers.data.planning import plan_dataset
from simpletuner.helpers.data.sampler import Bucket
from simpletuner.helpers.data.sources.base import SkippedImage
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.logs import terminal
from simpletuner.helpers.reporting.data_page.findings import LookedImage, find
from simpletuner.helpers.reporting.data_page.measures import Measures, measure
from simpletuner.helpers.reporting.data_page.texts import TextCounts, count_texts, is_uncaptioned, triggers_of
from simpletuner.helpers.reporting.html_report.markup import format_duration

logger = logging.getLogger(__name__)

MOST_THREADS = 8
"""Each holds an image of up to 64 Mi pixels, and its copies."""
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedBucket:
    """Images of one size."""

    size: str
    num_images: int
    draws_per_epoch: int
    batches_per_epoch: int
    """On one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedDataset:
    """One dataset of a configuration."""

    config: DatasetConfig
    problem: str | None
    """The reason if a run would refuse it, with its id."""
    images: tuple[LookedImage, ...]
    skipped: tuple[SkippedImage, ...]
    """Files that are left out, with the reason."""
    buckets: tuple[LookedBucket, ...]
    texts: TextCounts

    @property
    def trained(self) -> list[PlannedImage]:
        """The images that are neither masked out nor held out."""
        return [
            each.planned for each in self.images if "masked" not in each.findings and not each.is_held_out
        ]


def look(config: RunConfig, spec: ModelSpec, *, triggers: Sequence[str] = ()) -> list[LookedDataset]:
    """Read every image of every dataset, and find what is worth a look.

    Args:
        config: The run.
        spec: Its family.
        triggers: Texts of which each caption should hold one; instance_prompt without any.
    """
    datasets = [each for each in config.datasets if not each.disabled]
    plans = [_plan(dataset, config, spec) for dataset in datasets]
    usable = [
        (plan.config, image) for plan in plans if isinstance(plan, DatasetPlan) for image in plan.images
    ]
    images = [image for _, image in usable]
    # The same bytes are trained in no other dataset.
    held_out = {image.digest for own, image in usable if is_held_out(own, image.digest)}
    measured = iter([*_measured(images, config)])
    looked: list[LookedDataset] = []
    for dataset, plan in zip(datasets, plans, strict=True):
        if isinstance(plan, str):
            looked.append(_refused(dataset, plan))
        else:
            found = [next(measured) for _ in plan.images]
            looked.append(_looked(plan, found, triggers, held_out=held_out))
    find([image for each in looked for image in each.images])
    looked = [replace(each, problem=each.problem or _without_training(each)) for each in looked]
    return _with_buckets(looked, config)


def _plan(dataset: DatasetConfig, config: RunConfig, spec: ModelSpec) -> DatasetPlan | str:
    """The images of a dataset with their cuts and captions, or the reason why a run would refuse it."""
    folder = config.data.latents_folder(dataset)
    entries = entries_of(dataset, (*config.conditioning, *config.references))
    try:
        return plan_dataset(
            dataset,
            index=ImageIndex(index_file(folder, dataset), is_read_only=True),
            conditioning=ConditioningFinder(
                dataset,
                entries,
                index_of=lambda entry: ImageIndex(index_file(folder, entry), is_read_only=True),
            ),
            seed=config.training.seed,
            alignment=config.data.alignment(spec.pixel_alignment),
            aspect_decimals=config.data.aspect_bucket_rounding,
            caption_plan=caption_plan(dataset, config.data, seed=config.training.seed, caption_dropout=0),
        )
    except DataError as error:
        return _named(dataset, str(error))


def _named(dataset: DatasetConfig, problem: str) -> str:
    """A problem with the dataset's id, which most have already."""
    name = f"Dataset {dataset.id!r}"
    return problem if problem.startswith(name) else f"{name}: {problem}"


def _measured(images: Sequence[PlannedImage], config: RunConfig) -> Iterator[Measures | str]:
    """The measures of each image, in their order; a bar or log lines say how far it is."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(measure, masks=config.masks), images)
        try:
            yield from _shown(found, len(images))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _shown(found: Iterable[Measures | str], total: int) -> Iterator[Measures | str]:
    console = terminal()
    if console.is_terminal:
        yield from track(found, "images", total=total, console=console, transient=True)
        return
    started_s = logged_s = time.monotonic()
    for number, each in enumerate(found, start=1):
        yield each
        if time.monotonic() - logged_s >= _SECONDS_BETWEEN_LINES:
            logged_s = time.monotonic()
            left_s = (logged_s - started_s) / number * (total - number)
            logger.info("Looked at %d of %d images, %s left.", number, total, format_duration(left_s))


def _refused(dataset: DatasetConfig, problem: str) -> LookedDataset:
    return LookedDataset(
        config=dataset,
        problem=problem,
        images=(),
        skipped=(),
        buckets=(),
        texts=count_texts((), dataset),
    )


def _looked(
    plan: DatasetPlan,
    measured: Sequence[Measures | str],
    triggers: Sequence[str],
    *,
    held_out: Collection[str],
) -> LookedDataset:
    """A dataset before anything is compared; `held_out` are digests."""
    config = plan.config
    pairs = list(zip(plan.images, measured, strict=True))
    damaged = [
        SkippedImage(config.id, image.sample.path, found) for image, found in pairs if isinstance(found, str)
    ]
    has_one_caption = len({image.captions for image, _ in pairs}) == 1
    images = tuple(
        LookedImage(
            planned=image,
            measures=found,
            triggers=triggers_of(triggers, config),
            is_uncaptioned=is_uncaptioned(image, plan.caption_plan),
            is_regularisation=config.is_regularisation_data,
            is_held_out=image.digest in held_out,
            has_one_caption=has_one_caption,
        )
        for image, found in pairs
        if isinstance(found, Measures)
    )
    return LookedDataset(
        config=config,
        problem=None,
        images=images,
        skipped=(*damaged, *plan.skipped),
        buckets=(),
        texts=count_texts((image.planned for image in images), config),
    )


def _without_training(looked: LookedDataset) -> str | None:
    """The reason why a run would refuse a dataset of which no image is left to train."""
    config, images = looked.config, looked.images
    if images and (looked.trained or not config.is_trained):
        return None
    if images and all(each.is_held_out for each in images):
        return all_held_out(config, len(images))
    return _named(config, "no image of it can be used.")


def epochs_of(looked: Sequence[LookedDataset], config: RunConfig) -> Calendar:
    """The epochs of a run over the datasets that can be trained, on one process."""
    datasets = _drawn(looked, config)
    return calendar_of(
        [each.config for each in datasets],
        lambda places: sum(bucket.num_batches for _, bucket in _together(datasets, places, config)),
        batches_per_step=config.training.gradient_accumulation_steps,
    )


def _drawn(looked: Sequence[LookedDataset], config: RunConfig) -> list[DatasetBuckets]:
    """The buckets of each dataset that can be trained, in the order of the names."""
    return [
        DatasetBuckets(
            each.config,
            dict(sorted(Counter(image.bucket for image in each.trained).items())),
            batch_size=each.config.train_batch_size or config.training.train_batch_size,
        )
        for each in looked
        if each.config.is_trained and each.trained
    ]


def _together(
    datasets: Sequence[DatasetBuckets], places: Sequence[int], config: RunConfig
) -> list[tuple[DatasetConfig, Bucket]]:
    balances = config.regularisation.regularisation_target == "data"
    return buckets_of([datasets[place] for place in places], balances=balances)


def _with_buckets(looked: Sequence[LookedDataset], config: RunConfig) -> list[LookedDataset]:
    """The datasets with their buckets, as they are first drawn."""
    datasets = _drawn(looked, config)
    found: dict[str, list[LookedBucket]] = {}
    for stretch in epochs_of(looked, config).stretches:
        buckets: dict[str, list[LookedBucket]] = {}
        for dataset, bucket in _together(datasets, stretch.datasets, config):
            own = LookedBucket(
                size=bucket.name,
                num_images=bucket.num_samples,
                draws_per_epoch=bucket.samples_per_epoch,
                batches_per_epoch=bucket.num_batches,
            )
            buckets.setdefault(dataset.id, []).append(own)
        found = buckets | found
    return [replace(each, buckets=tuple(found.get(each.config.id, ()))) for each in looked]

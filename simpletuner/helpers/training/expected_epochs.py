"""The epochs of a run as they are expected before it, from the images whose headers were read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.data.phases import (
    Calendar,
    Curriculum,
    DatasetBuckets,
    buckets_of,
    even,
    gap_problem,
)
from simpletuner.helpers.data.preview import DatasetPreview
from simpletuner.helpers.data.sliders import slider_draws, slider_problems
from simpletuner.helpers.errors import DataError


def calendar_of(config: RunConfig, previews: Sequence[DatasetPreview]) -> Calendar:
    """The epochs of the run, in proportion to the images that were read.

    Raises:
        DataError: No dataset takes part in a step.
    """
    buckets = _buckets(config, previews)
    if not any(each.sizes for each in buckets):
        return even(0, num_datasets=len(buckets))
    calendar = Curriculum(
        buckets,
        seed=config.training.seed,
        batches_per_step=config.training.gradient_accumulation_steps,
        balances=config.regularisation.regularisation_target == "data",
    ).calendar
    if problem := gap_problem(calendar, config.training):
        raise DataError(problem)
    return calendar


def trained_datasets(config: RunConfig) -> list[DatasetConfig]:
    """The datasets that are trained, but for what they hold out."""
    return [each for each in config.datasets if each.is_trained]


def trained_of(previews: Sequence[DatasetPreview]) -> list[DatasetPreview]:
    """The datasets that are trained, but for what they hold out."""
    return [each for each in previews if each.config.is_trained]


def _buckets(config: RunConfig, previews: Sequence[DatasetPreview]) -> list[DatasetBuckets]:
    """The buckets of each dataset of which something is trained."""
    # Those in buckets are usable; the images that were not read are counted in proportion.
    return [
        DatasetBuckets(
            each.config,
            {
                f"{each.config.id} {name}": number * each.num_images / max(1, each.num_read)
                for name, number in each.groups.items()
            },
            batch_size=each.config.train_batch_size or config.training.train_batch_size,
        )
        for each in trained_of(previews)
    ]


def directions_out_of_balance(
    config: RunConfig, previews: Sequence[DatasetPreview], calendar: Calendar
) -> Iterator[str]:
    """What keeps the directions of a slider from balancing, in any stretch of the run."""
    datasets, balances = _buckets(config, previews), config.regularisation.regularisation_target == "data"
    for stretch in calendar.stretches:
        buckets = buckets_of([datasets[place] for place in stretch.datasets], balances=balances)
        yield from slider_problems(slider_draws(buckets))

"""The datasets of a run before it, from file names and image headers, and its epochs. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.data.caption_variants import limit_problem
from simpletuner.helpers.data.conditioning import Entry, entries_of
from simpletuner.helpers.data.phases import Calendar, even
from simpletuner.helpers.data.preview import DatasetPreview, preview, without_copies
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.training.evaluation_plan import without_training
from simpletuner.helpers.training.expected_epochs import calendar_of, trained_datasets, trained_of
from simpletuner.helpers.training.token_captions import check_previews


@dataclass(frozen=True, slots=True)
class Previews:
    """What is known of the datasets of a run before it begins."""

    read: tuple[DatasetPreview, ...]
    unseen: tuple[DatasetConfig, ...]
    """Those that a run downloads first."""
    calendar: Calendar
    """Without epochs if a dataset is unseen."""

    @property
    def are_whole(self) -> bool:
        """Whether every file of every dataset was read, and is usable."""
        return not self.unseen and all(
            each.is_whole and not each.problems and each.unreachable is None for each in self.read
        )


def preview_datasets(config: RunConfig, spec: ModelSpec, *, reads_all: bool = False) -> Previews:
    """Read file names and image headers of the datasets of a run.

    Args:
        config: The run.
        spec: Its family.
        reads_all: Read the headers of all images, not of the first 2,000, and download datasets of the hub.

    Raises:
        DataError: A dataset's folder cannot be read, no caption has tags to shuffle or has the new token, or
            there are too many variants of captions.
    """
    entries: tuple[Entry, ...] = (*config.conditioning, *config.references)
    unseen = [] if reads_all else [each for each in config.datasets if _needs_download(each, entries)]
    previews = without_copies(
        [
            preview(
                dataset,
                config.data,
                alignment=config.data.alignment(spec.pixel_alignment),
                seed=config.training.seed,
                reads_all=reads_all,
                conditioning=entries_of(dataset, entries),
            )
            for dataset in config.datasets
            if dataset not in unseen
        ]
    )
    _refuse(previews)
    check_previews(config, previews, are_all=not unseen)
    trained = trained_datasets(config)
    calendar = even(0, num_datasets=len(trained)) if unseen else calendar_of(config, previews)
    return Previews(tuple(previews), tuple(unseen), calendar)


def _needs_download(dataset: DatasetConfig, entries: Sequence[Entry]) -> bool:
    return any(each.needs_download for each in (dataset, *entries_of(dataset, entries)))


def _refuse(previews: Sequence[DatasetPreview]) -> None:
    """Refuse what the run would refuse, all at once; tags and shares only of datasets that were read whole.

    Raises:
        DataError: Of one dataset or of several.
    """
    problems = [
        f"Dataset {each.config.id!r}: {'; '.join(each.tags.lines())}."
        for each in previews
        if each.tags.is_error and each.is_whole
    ]
    several = {
        each.config.id: each.expected_captions for each in trained_of(previews) if each.num_variants > 1
    }
    problems += without_training(previews)
    problems += filter(None, [limit_problem(several), *(each.conditioning_problem for each in previews)])
    if problems:
        raise DataError("\n".join(problems))

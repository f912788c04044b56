"""Datasets that begin or end within a run: its stretches of epochs over the same datasets."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import TrainingConfig
from simpletuner.helpers.data.sampler import Bucket, Draw, Sampler, draws_per_image
from simpletuner.helpers.data.sliders import turn_of
from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.names import counted, printable


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive epochs over the same datasets."""

    start: int
    """Global batch that it begins with."""
    epoch: int
    """Number of its first epoch, from 0."""
    length: int
    """Global batches in each epoch."""
    datasets: tuple[int, ...]
    """Places of these datasets."""


@dataclass(frozen=True, slots=True)
class Calendar:
    """Where the epochs of a run end among its global batches.

    A new epoch begins where a dataset begins or ends, so the epoch before may be cut short.
    """

    stretches: tuple[Stretch, ...]
    """In their order; the first begins with batch 0."""
    end: int | None = None
    """Global batch for which no dataset is active; None if there is none."""

    def number_at(self, batch: int) -> int:
        """Number of the stretch that holds a global batch; the first for those before it.

        A resumed run counts back from its step, whose batches may have been fewer.
        """
        return max(0, bisect_right(self.stretches, batch, key=lambda each: each.start) - 1)

    def epochs_before(self, batch: int) -> float:
        """Epochs up to a global batch, with the share of the last one."""
        stretch = self.stretches[self.number_at(max(0, batch - 1))]
        return stretch.epoch + (batch - stretch.start) / max(1, stretch.length)

    def epoch_of(self, batch: int) -> int:
        """Number of the epoch of a global batch, from 0: as many are complete before it."""
        stretch = self.stretches[self.number_at(batch)]
        return stretch.epoch + (batch - stretch.start) // stretch.length

    def end_of(self, epochs: int) -> int:
        """Global batches up to the end of this many epochs."""
        number = max(0, bisect_right(self.stretches, epochs - 1, key=lambda each: each.epoch) - 1)
        stretch, following = self.stretches[number], self.stretches[number + 1 : number + 2]
        ends = [
            stretch.start + (epochs - stretch.epoch) * stretch.length,
            *(each.start for each in following),
        ]
        return min(ends)

    def num_steps(self, training: TrainingConfig) -> int:
        """Optimiser steps of a whole run: max_train_steps, else enough for num_train_epochs."""
        if training.max_train_steps is not None:
            return training.max_train_steps
        return math.ceil(self.end_of(training.num_train_epochs) / training.gradient_accumulation_steps)

    def reached(self, training: TrainingConfig) -> list[Stretch]:
        """The stretches that a whole run has steps of."""
        batches = self.num_steps(training) * training.gradient_accumulation_steps
        return [each for each in self.stretches if each.start < batches]


def even(length: int, *, num_datasets: int = 1) -> Calendar:
    """The calendar of a run whose epochs have the same number of global batches."""
    return Calendar((Stretch(start=0, epoch=0, length=length, datasets=tuple(range(num_datasets))),))


def calendar_of(
    datasets: Sequence[DatasetConfig],
    length_of: Callable[[tuple[int, ...]], int],
    *,
    batches_per_step: int,
) -> Calendar:
    """The calendar of datasets, up to the first global batch for which none is active.

    Args:
        datasets: Their settings.
        length_of: Places of active datasets -> global batches in an epoch of them.
        batches_per_step: Global batches in an optimiser step.
    """

    def active(batch: int, epoch: int) -> tuple[int, ...]:
        step = batch // batches_per_step + 1
        return tuple(
            place for place, each in enumerate(datasets) if _takes_part(each, step=step, epoch=epoch + 1)
        )

    starts = {(each.start_step - 1) * batches_per_step for each in datasets}
    ends = {each.end_step * batches_per_step for each in datasets if each.end_step is not None}
    epochs = {each.start_epoch - 1 for each in datasets}
    epochs |= {each.end_epoch for each in datasets if each.end_epoch is not None}
    stretches: list[Stretch] = []
    batch: int | None = 0
    epoch = 0
    while batch is not None:
        found = active(batch, epoch)
        if not found:
            return Calendar(tuple(stretches), end=batch)
        stretch = Stretch(start=batch, epoch=epoch, length=length_of(found), datasets=found)
        stretches.append(stretch)
        changes = {batch + (each - epoch) * stretch.length for each in epochs} | starts | ends
        batch = next(
            (
                each
                for each in sorted(changes)
                if each > stretch.start
                and active(each, stretch.epoch + (each - stretch.start) // stretch.length) != found
            ),
            None,
        )
        if batch is not None:
            epoch += math.ceil((batch - stretch.start) / stretch.length)
    return Calendar(tuple(stretches))


def gap_problem(calendar: Calendar, training: TrainingConfig) -> str | None:
    """The place in the run where no dataset is active, or None."""
    if calendar.end is None:
        return None
    step, epoch = calendar.end // training.gradient_accumulation_steps + 1, 1
    if calendar.stretches:
        last = calendar.stretches[-1]
        epoch = last.epoch + math.ceil((calendar.end - last.start) / last.length) + 1
    is_reached = (
        step <= training.max_train_steps
        if training.max_train_steps is not None
        else epoch <= training.num_train_epochs
    )
    if not is_reached:
        return None
    return (
        f"No dataset takes part in step {step}, where epoch {epoch} begins. Let one begin earlier or end "
        "later: start_step, start_epoch, end_step, end_epoch."
    )


def idle_datasets(
    datasets: Sequence[DatasetConfig], calendar: Calendar, training: TrainingConfig
) -> list[str]:
    """A sentence for each dataset that takes part in no step of the run."""
    steps = calendar.num_steps(training)
    batches = steps * training.gradient_accumulation_steps
    used = {place for each in calendar.stretches if each.start < batches for place in each.datasets}
    return [
        f"dataset {dataset.id} takes part in none of the {counted(steps, 'step')}. Let it begin earlier, or "
        "disable it."
        for place, dataset in enumerate(datasets)
        if place not in used
    ]


def stretch_lines(
    datasets: Sequence[DatasetConfig], calendar: Calendar, training: TrainingConfig
) -> list[str]:
    """A line on each stretch of a run with several."""
    accumulated, reached = training.gradient_accumulation_steps, calendar.reached(training)
    if len(reached) == 1 and len(reached[0].datasets) == len(datasets):
        return []
    return [
        f"from step {each.start // accumulated + 1}: "
        f"{', '.join(printable(datasets[place].id) for place in each.datasets)}; epochs of "
        f"{counted(each.length, 'batch', 'batches')}"
        for each in reached
    ]


def has_steps(datasets: Sequence[DatasetConfig]) -> bool:
    """Whether a dataset begins or ends at an optimiser step."""
    return any(each.start_step > 1 or each.end_step is not None for each in datasets)


def batch_sizes(sizes: Iterable[int]) -> str:
    """The numbers of images in batches, for people."""
    smallest, *_, largest = sorted([*sizes] * 2)
    return counted(largest, "image") if smallest == largest else f"{smallest} to {largest} images"


def _takes_part(dataset: DatasetConfig, *, step: int, epoch: int) -> bool:
    """Whether a dataset is active; step and epoch count from 1."""
    is_over = (dataset.end_step is not None and step > dataset.end_step) or (
        dataset.end_epoch is not None and epoch > dataset.end_epoch
    )
    return dataset.start_step <= step and dataset.start_epoch <= epoch and not is_over


@dataclass(frozen=True, slots=True)
class DatasetBuckets:
    """The buckets of a dataset."""

    config: DatasetConfig
    sizes: Mapping[str, float]
    """Bucket -> number of its images."""
    batch_size: int
    """Images in a global batch."""


def buckets_of(datasets: Sequence[DatasetBuckets], *, balances: bool) -> list[tuple[DatasetConfig, Bucket]]:
    """Each bucket of datasets that are drawn together, with its dataset, in their order.

    Batches never mix datasets, because repeats and targets differ.
    """
    draws = draws_per_image(
        [each.config for each in datasets], [sum(each.sizes.values()) for each in datasets], balances=balances
    )
    return [
        (
            each.config,
            Bucket(
                name=name,
                num_samples=math.ceil(number),
                samples_per_epoch=max(1, round(number * factor)),
                batch_size=each.batch_size,
                group=turn_of(each.config),
            ),
        )
        for each, factor in zip(datasets, draws, strict=True)
        for name, number in each.sizes.items()
    ]


class Curriculum:
    """The endless order of global batches of datasets that may begin or end within the run.

    Each stretch of the calendar has a sampler of its own. The passes over a bucket go on from one stretch to
    the next; the images that an epoch which is cut short has not drawn are not made up for.
    """

    def __init__(
        self, datasets: Sequence[DatasetBuckets], *, seed: int, batches_per_step: int, balances: bool
    ) -> None:
        self._datasets, self._balances = tuple(datasets), balances
        self.configs = tuple(each.config for each in datasets)
        self.calendar = calendar_of(
            self.configs,
            lambda places: max(1, sum(bucket.num_batches for _, bucket in self.buckets(places))),
            batches_per_step=batches_per_step,
        )
        firsts = [0, *accumulate(len(each.sizes) for each in datasets)]
        drawn = [0] * firsts[-1]
        self._places: list[list[int]] = []
        self._samplers: list[Sampler] = []
        self._first_samples = [0]
        stretches = self.calendar.stretches
        for stretch, following in zip(stretches, [*stretches[1:], None], strict=True):
            buckets = [bucket for _, bucket in self.buckets(stretch.datasets)]
            places = [place for each in stretch.datasets for place in range(firsts[each], firsts[each + 1])]
            self._places.append(places)
            self._samplers.append(
                Sampler(
                    buckets, seed=seed, first_epoch=stretch.epoch, drawn=[drawn[place] for place in places]
                )
            )
            if following is not None:
                num_samples = self._samplers[-1].samples_before(following.start - stretch.start)
                self._first_samples.append(self._first_samples[-1] + num_samples)
                for place, bucket in zip(places, buckets, strict=True):
                    drawn[place] += (following.epoch - stretch.epoch) * bucket.num_batches

    def buckets(self, places: Sequence[int]) -> list[tuple[DatasetConfig, Bucket]]:
        """Each bucket of some of the datasets, as they are drawn together, with its dataset."""
        return buckets_of([self._datasets[place] for place in places], balances=self._balances)

    def small_buckets(self) -> list[Bucket]:
        """The buckets with fewer samples than a batch of theirs."""
        buckets = [bucket for _, bucket in self.buckets(range(len(self._datasets)))]
        return [bucket for bucket in buckets if bucket.num_samples < bucket.batch_size]

    def draw(self, index: int) -> Draw:
        """The global batch with this number; its bucket is counted among those of all datasets."""
        number = self.calendar.number_at(index)
        draw = self._samplers[number].draw(index - self.calendar.stretches[number].start)
        return replace(
            draw,
            bucket=self._places[number][draw.bucket],
            first_sample=self._first_samples[number] + draw.first_sample,
        )

    def batches_before(self, num_samples: int) -> int:
        """Global batches that a run has drawn after this number of samples.

        Raises:
            CheckpointError: A batch would end at another number.
        """
        number = bisect_right(self._first_samples, num_samples) - 1
        own, sampler = num_samples - self._first_samples[number], self._samplers[number]
        index = sampler.index_after(own)
        if sampler.samples_before(index) == own:
            return self.calendar.stretches[number].start + index
        sizes = {each.batch_size for each in self._datasets}
        text = f"The checkpoint was saved after {num_samples} samples, "
        if len(sizes) > 1:
            raise CheckpointError(
                f"{text}where no batch ends here. Resume with its processes, datasets and train_batch_size."
            )
        fitting = [str(size) for size in range(1, 65) if num_samples % size == 0]
        raise CheckpointError(
            f"{text}which {sizes.pop()} (processes x train_batch_size) does not divide. Resume with one of: "
            f"{', '.join(fitting)}."
        )

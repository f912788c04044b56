"""The endless order of samples: a pure function of the seed and the batch number, without state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.randomness import mix

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.datasets import DatasetConfig

_CACHED_NUMBERS = 1 << 24  # 64 MiB of permutations
_CACHED_ORDERS = 1024  # of a dataset with few images: each is an object of some 400 bytes beside its numbers


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples that may share a batch."""

    name: str
    """Seeds its order: two buckets of one name have the same order."""
    num_samples: int
    samples_per_epoch: int
    """Requested draws: num_samples * draws_per_image, rounded."""
    batch_size: int
    """Samples in a global batch."""
    group: int = 0
    """The batches of an epoch alternate between the groups, in ascending order."""

    @property
    def num_batches(self) -> int:
        """Batches in each epoch: whole ones, at least one."""
        return max(1, -(-self.samples_per_epoch // self.batch_size))


@dataclass(frozen=True, slots=True)
class Draw:
    """One global batch."""

    epoch: int
    bucket: int
    samples: tuple[int, ...]
    """Positions in the bucket."""
    passes: tuple[int, ...]
    """How often each of them was drawn before."""
    turn: int
    """Number of the batch among all of its bucket."""
    first_sample: int
    """Samples of all batches before it."""


def draws_per_image(
    datasets: Sequence[DatasetConfig], num_images: Sequence[float], *, balances: bool
) -> list[float]:
    """How often an epoch draws each image of a dataset, for all datasets: by repeats and probability.

    Args:
        datasets: Their settings.
        num_images: The number of images of each.
        balances: Scale the draws of regularisation images, so that there are as many as of the others, as in
            kohya's scripts.
    """
    draws = [(each.repeats + 1) * each.probability for each in datasets]
    totals = {True: 0.0, False: 0.0}
    for dataset, number, each in zip(datasets, num_images, draws, strict=True):
        totals[dataset.is_regularisation_data] += number * each
    if not balances or not totals[True] or not totals[False]:
        return draws
    scale = totals[False] / totals[True]
    return [
        each * scale if dataset.is_regularisation_data else each
        for dataset, each in zip(datasets, draws, strict=True)
    ]


def shuffled(seed: int, purpose: str, index: int, *, length: int) -> npt.NDArray[np.int32]:
    """A permutation of range(length) that depends only on the arguments.

    Philox's raw words are specified by its authors, unlike numpy's shuffle, so every version of numpy gives
    the same order.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    words = np.random.Philox(key=mix(seed, purpose, index)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int32)


def inspection_order(config: DatasetConfig, number: int, seed: int) -> npt.NDArray[np.int64]:
    """The order in which a dataset's images are inspected, as positions: random if max_num_samples is set."""
    if config.max_num_samples is None:
        return np.arange(number)
    return shuffled(seed, f"max_num_samples\x1f{config.id}", 0, length=number).astype(np.int64)


class Sampler:
    """Draws global batches from buckets.

    Each bucket is an endless sequence of shuffled passes over its samples, and each epoch takes the next
    whole batches of it, so the last batch of an epoch may begin the next pass. After whole epochs the draws
    of two samples of a bucket differ by at most one. The batches of each group are spread evenly over an
    epoch.
    """

    def __init__(
        self, buckets: Sequence[Bucket], *, seed: int, first_epoch: int = 0, drawn: Sequence[int] = ()
    ) -> None:
        """Take the buckets.

        Args:
            buckets: At least one.
            seed: Of the order.
            first_epoch: Number of the first epoch.
            drawn: Batches of each bucket before the first epoch; empty for none.
        """
        assert buckets, "a sampler needs a bucket"
        assert all(bucket.num_samples > 0 for bucket in buckets), "a bucket needs a sample"
        self._buckets = tuple(buckets)
        self._seed = seed
        self._first_epoch = first_epoch
        self._drawn = tuple(drawn) or (0,) * len(buckets)
        self._num_batches = tuple(bucket.num_batches for bucket in buckets)
        self._starts = np.cumsum([0, *self._num_batches])
        self._sizes = np.repeat([bucket.batch_size for bucket in buckets], self._num_batches)
        self._groups = np.repeat([bucket.group for bucket in buckets], self._num_batches)
        self._num_groups = len({bucket.group for bucket in buckets})
        self._lock = RLock()  # the loader's thread draws, the one that trains counts samples
        self._orders: dict[tuple[str, int], npt.NDArray[np.int32]] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in each epoch."""
        return int(self._starts[-1])

    def draw(self, index: int) -> Draw:
        """The global batch with this number, computed without the earlier ones."""
        epoch, position = divmod(index, self.batches_per_epoch)
        entry = int(self._epoch_order(self._first_epoch + epoch)[position])
        bucket = int(np.searchsorted(self._starts, entry, side="right")) - 1
        within = epoch * self._num_batches[bucket] + entry - int(self._starts[bucket])
        batch, size = self._drawn[bucket] + within, self._buckets[bucket].batch_size
        turns = [self._sample(bucket, batch * size + slot) for slot in range(size)]
        samples, passes = zip(*turns, strict=True)
        return Draw(
            epoch=self._first_epoch + epoch,
            bucket=bucket,
            samples=samples,
            passes=passes,
            turn=batch,
            first_sample=self.samples_before(index),
        )

    def samples_before(self, index: int) -> int:
        """Samples of all batches before the one with this number."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return epoch * int(self._sizes.sum()) + int(self._counts(epoch)[position])

    def index_after(self, num_samples: int) -> int:
        """Number of the first batch that does not lie wholly within this number of samples."""
        epoch, rest = divmod(num_samples, int(self._sizes.sum()))
        position = int(np.searchsorted(self._counts(epoch), rest, side="right")) - 1
        return epoch * self.batches_per_epoch + position

    def _counts(self, epoch: int) -> npt.NDArray[np.int32]:
        """Samples of the epoch before each of its batches, then of the whole epoch."""

        def make() -> npt.NDArray[np.int32]:
            sizes = self._sizes[self._epoch_order(self._first_epoch + epoch)]
            return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)

        return self._cached("samples", self._first_epoch + epoch, make)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int32]:
        """The epoch's batches, shuffled within each group; groups of equal size take strict turns."""
        order = self._order("epoch", epoch, self.batches_per_epoch)
        if self._num_groups == 1:
            return order
        return self._cached("turns", epoch, partial(_in_turns, order, self._groups[order]))

    def _sample(self, bucket: int, turn: int) -> tuple[int, int]:
        """The sample of one turn in the bucket's endless sequence, and the number of the pass."""
        name, num_samples = self._buckets[bucket].name, self._buckets[bucket].num_samples
        pass_index, position = divmod(turn, num_samples)
        return int(self._order(f"pass\x1f{name}", pass_index, num_samples)[position]), pass_index

    def _order(self, purpose: str, index: int, length: int) -> npt.NDArray[np.int32]:
        make = partial(shuffled, self._seed, purpose, index, length=length)
        return self._cached(purpose, index, make)

    def _cached(
        self, purpose: str, index: int, make: Callable[[], npt.NDArray[np.int32]]
    ) -> npt.NDArray[np.int32]:
        """A cached order: neighbouring batches need the same few."""
        with self._lock:
            order = self._orders.get((purpose, index))
            if order is None:
                order = make()
                num_numbers = sum(map(len, self._orders.values())) + len(order)
                if num_numbers > _CACHED_NUMBERS or len(self._orders) == _CACHED_ORDERS:
                    self._orders.clear()
                self._orders[purpose, index] = order
            return order


def _in_turns(order: npt.NDArray[np.int32], groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The entries of an order, each group spread evenly over it without a change of its own order."""
    due = np.empty(len(order))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        due[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.lexsort((groups, due))]

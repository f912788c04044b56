"""The endless order of samples: a pure function of seed, epoch and place, with no state to lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.randomness import mix

_KEPT_NUMBERS = 1 << 24  # 64 MiB of permutations


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples that may share a batch."""

    name: str
    """Its random stream: two buckets of one name have one order."""
    num_samples: int
    samples_per_epoch: int
    """How many draws an epoch makes: samples times (repeats + 1), or a share of it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One global batch: which samples of which bucket."""

    epoch: int
    bucket: int
    samples: tuple[int, ...]


def shuffled(seed: int, purpose: str, index: int, *, length: int) -> npt.NDArray[np.int32]:
    """A permutation of range(length) that depends on the arguments alone.

    The raw words of Philox are specified by its authors, unlike numpy's shuffling, so that the order is the
    same with every version of numpy.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    words = np.random.Philox(key=mix(seed, purpose, index)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int32)


class Sampler:
    """Draws global batches out of buckets.

    Each bucket is an endless sequence of shuffled passes over its samples, of which every epoch takes the
    next part: whole batches, so the last batch of a bucket that does not divide begins the next pass.
    After whole epochs no sample of a bucket was drawn over one time more often than another.
    """

    def __init__(self, buckets: Sequence[Bucket], *, seed: int, batch_size: int) -> None:
        assert buckets, "a sampler needs a bucket"
        assert all(bucket.num_samples > 0 for bucket in buckets), "a bucket needs a sample"
        self._buckets = tuple(buckets)
        self._seed = seed
        self._batch_size = batch_size
        self._num_batches = tuple(max(1, -(-bucket.samples_per_epoch // batch_size)) for bucket in buckets)
        self._starts = np.cumsum([0, *self._num_batches])
        self._orders: dict[tuple[str, int], npt.NDArray[np.int32]] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one epoch, the same in every epoch."""
        return int(self._starts[-1])

    def num_draws(self, bucket: int) -> int:
        """Draws from a bucket in one epoch, those that fill up its last batch included."""
        return self._num_batches[bucket] * self._batch_size

    def draw(self, index: int) -> Draw:
        """The global batch of a place in the endless sequence, found without going through those before."""
        epoch, place = divmod(index, self.batches_per_epoch)
        entry = int(self._order("epoch", epoch, self.batches_per_epoch)[place])
        bucket = int(np.searchsorted(self._starts, entry, side="right")) - 1
        batch = epoch * self._num_batches[bucket] + entry - int(self._starts[bucket])
        first = batch * self._batch_size
        samples = tuple(self._sample(bucket, first + slot) for slot in range(self._batch_size))
        return Draw(epoch=epoch, bucket=bucket, samples=samples)

    def _sample(self, bucket: int, turn: int) -> int:
        """The sample whose turn it is in the endless sequence of one bucket."""
        facts = self._buckets[bucket]
        pass_index, place = divmod(turn, facts.num_samples)
        return int(self._order(f"pass\x1f{facts.name}", pass_index, facts.num_samples)[place])

    def _order(self, purpose: str, index: int, length: int) -> npt.NDArray[np.int32]:
        """A permutation, kept while there is room: neighbouring places need the same few."""
        order = self._orders.get((purpose, index))
        if order is None:
            if sum(map(len, self._orders.values())) + length > _KEPT_NUMBERS:
                self._orders.clear()
            order = self._orders[purpose, index] = shuffled(self._seed, purpose, index, length=length)
        return order

"""The endless order of samples: a pure function of the seed and the batch number, without state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.randomness import mix

_CACHED_NUMBERS = 1 << 24  # 64 MiB of permutations
_CACHED_ORDERS = 1024  # of a dataset with few images: each is an object of some 400 bytes beside its numbers


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples that may share a batch."""

    name: str
    """Seeds its order: two buckets of one name have the same order."""
    num_samples: int
    samples_per_epoch: int
    """Requested draws: num_samples * (repeats + 1) * probability, rounded."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One global batch."""

    epoch: int
    bucket: int
    samples: tuple[int, ...]
    """Positions in the bucket."""
    passes: tuple[int, ...]
    """How often each of them was drawn before."""


def shuffled(seed: int, purpose: str, index: int, *, length: int) -> npt.NDArray[np.int32]:
    """A permutation of range(length) that depends only on the arguments.

    Philox's raw words are specified by its authors, unlike numpy's shuffle, so every version of numpy gives
    the same order.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    words = np.random.Philox(key=mix(seed, purpose, index)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int32)


class Sampler:
    """Draws global batches from buckets.

    Each bucket is an endless sequence of shuffled passes over its samples, and each epoch takes the next
    whole batches of it, so the last batch of an epoch may begin the next pass. After whole epochs the draws
    of two samples of a bucket differ by at most one.
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
        """Global batches in each epoch."""
        return int(self._starts[-1])

    def draw(self, index: int) -> Draw:
        """The global batch with this number, computed without the earlier ones."""
        epoch, position = divmod(index, self.batches_per_epoch)
        entry = int(self._order("epoch", epoch, self.batches_per_epoch)[position])
        bucket = int(np.searchsorted(self._starts, entry, side="right")) - 1
        batch = epoch * self._num_batches[bucket] + entry - int(self._starts[bucket])
        first = batch * self._batch_size
        turns = [self._sample(bucket, first + slot) for slot in range(self._batch_size)]
        samples, passes = zip(*turns, strict=True)
        return Draw(epoch=epoch, bucket=bucket, samples=samples, passes=passes)

    def _sample(self, bucket: int, turn: int) -> tuple[int, int]:
        """The sample of one turn in the bucket's endless sequence, and the number of the pass."""
        name, num_samples = self._buckets[bucket].name, self._buckets[bucket].num_samples
        pass_index, position = divmod(turn, num_samples)
        return int(self._order(f"pass\x1f{name}", pass_index, num_samples)[position]), pass_index

    def _order(self, purpose: str, index: int, length: int) -> npt.NDArray[np.int32]:
        """A cached permutation: neighbouring batches need the same few."""
        order = self._orders.get((purpose, index))
        if order is None:
            num_numbers = sum(map(len, self._orders.values())) + length
            if num_numbers > _CACHED_NUMBERS or len(self._orders) == _CACHED_ORDERS:
                self._orders.clear()
            order = self._orders[purpose, index] = shuffled(self._seed, purpose, index, length=length)
        return order

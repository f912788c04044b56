"""The datasets of a slider: which take turns, and whether their directions balance. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.sampler import Bucket

LARGEST_IMBALANCE = 0.1


def turn_of(dataset: DatasetConfig) -> int:
    """Place in the turns that batches take: positive 0, negative 1, neutral 2."""
    strength = dataset.slider_strength or 0.0
    return 0 if strength > 0 else 1 if strength < 0 else 2


def slider_draws(buckets: Iterable[tuple[DatasetConfig, Bucket]]) -> Counter[float]:
    """Strength of a slider -> images that an epoch draws at it, in whole batches."""
    draws: Counter[float] = Counter()
    for dataset, bucket in buckets:
        if dataset.slider_strength is not None:
            draws[dataset.slider_strength] += bucket.num_batches * bucket.batch_size
    return draws


def slider_problems(draws: Mapping[float, int]) -> Iterator[str]:
    """What keeps a slider's directions from being each other's opposite.

    At the start the gradient is the mean of strength times the gradient of a plain LoRA, so what the images
    of both directions share cancels where the strengths sum to zero.

    Args:
        draws: Strength -> number of images drawn at it in an epoch, in whole batches.
    """
    positive = sum(number * strength for strength, number in draws.items() if strength > 0)
    negative = -sum(number * strength for strength, number in draws.items() if strength < 0)
    if draws and not (positive and negative):
        found, other = ("positive", "negative") if positive else ("negative", "positive")
        yield (
            f"slider_strength is {found} in every dataset that has it, so the slider learns one direction "
            f"alone. Add a dataset with a {other} one."
        )
    elif abs(positive - negative) > LARGEST_IMBALANCE * max(positive, negative):
        found = ", ".join(
            f"{number} at slider_strength {strength:g}" for strength, number in sorted(draws.items())
        )
        yield (
            f"the directions of the slider do not balance: an epoch draws {found}, in whole batches of each "
            "size. Set repeats, slider_strength or train_batch_size so that the products of number and "
            "strength are equal."
        )

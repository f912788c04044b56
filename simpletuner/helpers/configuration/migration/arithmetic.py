"""Optimiser steps and samples of a run, counted as each program counts them.

Source: data loaders and training loops of kohya's sd-scripts, OneTrainer and diffusers' examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simpletuner.helpers.contracts import Size

_ONE_TRAINER_ASPECTS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run of the other program is."""

    steps: int
    """Optimiser steps."""
    samples: int
    """Images that pass through the model, each as often as it does."""
    steps_per_epoch: int | None = None
    """For intervals in epochs; None where the program has no epochs."""
    formula: str = ""
    """The calculation, with its numbers."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Images of one size in an epoch."""

    bucket: Size
    number: int


def full_and_partial_batches(draws: Iterable[Draws], batch_size: int) -> int:
    """Batches of an epoch if the last one of a bucket may be smaller."""
    return sum(math.ceil(number / batch_size) for number in _by_bucket(draws).values())


def full_batches(draws: Iterable[Draws], batch_size: int) -> int:
    """Batches of an epoch if the rest of a bucket is left out."""
    return sum(number // batch_size for number in _by_bucket(draws).values())


def kohya_regularisation(images: Sequence[Draws], num_train: int) -> list[Draws]:
    """The draws of regularisation images until there are `num_train`, as many as of others.

    Each is drawn by its repeats, then once more in turn.
    """
    numbers, total, is_first = [0] * len(images), 0, True
    while images and total < num_train:
        for index, image in enumerate(images):
            times = image.number if is_first else 1
            numbers[index] += times
            total += times
            if total >= num_train:
                break
        is_first = False
    return [Draws(image.bucket, number) for image, number in zip(images, numbers, strict=True) if number]


def _by_bucket(draws: Iterable[Draws]) -> Counter[Size]:
    totals: Counter[Size] = Counter()
    for each in draws:
        totals[each.bucket] += each.number
    return totals


def steps_per_epoch(batches: int, *, accumulation: int, processes: int = 1) -> int:
    """Optimiser steps of an epoch in kohya's and diffusers' loops, whose last step may have fewer batches."""
    return math.ceil(math.ceil(batches / processes) / accumulation)


def kohya_buckets(resolution: Size, *, smallest: int, largest: int, step: int) -> list[Size]:
    """Bucket sizes of kohya's: with each edge that is a multiple of the step, the longest other edge."""
    area = resolution.width * resolution.height
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for edge in range(smallest, largest + 1, step):
        other = min(largest, area // edge // step * step)
        if other >= smallest:
            sizes |= {(edge, other), (other, edge)}
    return [Size(width=width, height=height) for width, height in sorted(sizes)]


def kohya_bucket(image: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of an image: its own size if there is one, else that with the nearest aspect ratio."""
    if image in buckets:
        return image
    aspect = image.width / image.height
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - aspect))


def kohya_bucket_without_upscaling(image: Size, resolution: Size, *, step: int) -> Size:
    """The bucket of an image that is only ever scaled down: its size, or its shrunk size, cut to the step."""
    width, height = image.width, image.height
    area = resolution.width * resolution.height
    if width * height > area:
        aspect = width / height
        by_width = _cut(math.sqrt(area * aspect) + 0.5, step)
        by_height = _cut(math.sqrt(area / aspect) + 0.5, step)
        error_by_width = abs(by_width / max(step, _cut(by_width / aspect + 0.5, step)) - aspect)
        error_by_height = abs(_cut(by_height * aspect + 0.5, step) / max(step, by_height) - aspect)
        if error_by_width < error_by_height:
            width, height = by_width, int(by_width / aspect + 0.5)
        else:
            width, height = int(by_height * aspect + 0.5), by_height
    return Size(width=_cut(width, step), height=_cut(height, step))


def _cut(length: float, step: int) -> int:
    return int(length) // step * step


def one_trainer_bucket(image: Size, resolution: int, *, step: int = 64) -> Size:
    """OneTrainer's bucket of an image: of 17 aspect ratios at one area, the nearest by height over width."""
    sizes = {}
    for aspect in _ONE_TRAINER_ASPECTS:
        short, long = resolution / math.sqrt(aspect), resolution * math.sqrt(aspect)
        edges = max(1, round(short / step)) * step, max(1, round(long / step)) * step
        sizes[edges] = Size(height=edges[0], width=edges[1])
        sizes[edges[::-1]] = Size(height=edges[1], width=edges[0])
    aspect = image.height / image.width
    return min(sizes.values(), key=lambda size: abs(size.height / size.width - aspect))

"""Buckets and batches by hand."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.migration.arithmetic import (
    Draws,
    full_and_partial_batches,
    full_batches,
    kohya_bucket,
    kohya_bucket_without_upscaling,
    kohya_buckets,
    kohya_regularisation,
    one_trainer_bucket,
    steps_per_epoch,
)
from simpletuner.helpers.contracts import Size


def _size(width: int, height: int) -> Size:
    return Size(width=width, height=height)


# 5 draws of one size and 3 of another: batches of 2 are 3 + 2 with the rests, 2 + 1 without.
def test_batches_are_counted_by_bucket() -> None:
    draws = [Draws(_size(64, 64), 2), Draws(_size(64, 64), 3), Draws(_size(64, 128), 3)]
    assert full_and_partial_batches(draws, 2) == 5
    assert full_batches(draws, 2) == 3


@pytest.mark.parametrize(
    ("batches", "accumulation", "processes", "steps"),
    [(7, 1, 1, 7), (7, 2, 1, 4), (7, 2, 2, 2), (8, 4, 1, 2)],
)
def test_the_last_step_of_an_epoch_may_have_fewer_batches(
    batches: int, accumulation: int, processes: int, steps: int
) -> None:
    assert steps_per_epoch(batches, accumulation=accumulation, processes=processes) == steps


def test_kohyas_buckets_stay_within_the_area_and_the_edges() -> None:
    buckets = kohya_buckets(_size(1024, 1024), smallest=256, largest=2048, step=64)
    assert _size(1024, 1024) in buckets
    assert _size(832, 1216) in buckets
    assert all(size.width * size.height <= 1024 * 1024 for size in buckets)
    assert {edge for size in buckets for edge in (size.width, size.height)} <= set(range(256, 2049, 64))


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((512, 512), (1024, 1024)),
        ((2000, 3000), (832, 1216)),
        ((640, 1600), (640, 1600)),
        ((4000, 1000), (2048, 512)),
    ],
)
def test_kohyas_bucket_has_the_nearest_aspect(image: tuple[int, int], bucket: tuple[int, int]) -> None:
    buckets = kohya_buckets(_size(1024, 1024), smallest=256, largest=2048, step=64)
    assert kohya_bucket(_size(*image), buckets) == _size(*bucket)


# 700x500 is below the area: cut to 64s. 2000x1000 shrinks to 724.08x362.04 for 512x512: by height
# 320 wide 640 (2.0, no error), so 640x320; by width 704x320 (2.2).
@pytest.mark.parametrize(
    ("image", "bucket"), [((400, 300), (384, 256)), ((2000, 1000), (640, 320)), ((1024, 1024), (512, 512))]
)
def test_kohyas_bucket_without_upscaling_is_the_image_cut(
    image: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert kohya_bucket_without_upscaling(_size(*image), _size(512, 512), step=64) == _size(*bucket)


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((900, 900), (1024, 1024)),
        ((1500, 1000), (1280, 832)),
        ((1000, 1500), (832, 1280)),
        ((9000, 1000), (2048, 512)),
    ],
)
def test_one_trainers_bucket_is_one_of_its_aspects(image: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert one_trainer_bucket(_size(*image), 1024) == _size(*bucket)


@pytest.mark.parametrize(
    ("repeats", "num_train", "numbers"),
    [([1, 1, 1], 5, [2, 2, 1]), ([1] * 10, 4, [1] * 4), ([3, 3, 3], 4, [3, 3]), ([], 4, []), ([1], 3, [3])],
    ids=["fewer", "more", "with repeats", "none", "one"],
)
def test_regularisation_images_are_drawn_until_there_are_as_many(
    repeats: list[int], num_train: int, numbers: list[int]
) -> None:
    images = [Draws(_size(64, 64), each) for each in repeats]
    assert [each.number for each in kohya_regularisation(images, num_train)] == numbers

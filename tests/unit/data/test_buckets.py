"""Aspect buckets, resizing and cropping as arithmetic."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.buckets import (
    bucket_size,
    is_too_small,
    place,
)

EDGES = st.integers(min_value=1, max_value=4000)
SIZES = st.builds(Size, EDGES, EDGES).filter(
    lambda size: max(size.height, size.width) <= 32 * min(size.height, size.width)
)
ALIGNMENTS = st.sampled_from([8, 16, 64])
STYLES = st.sampled_from(["center", "random", "corner"])


@pytest.mark.parametrize(
    ("image_px", "resolution", "resolution_type", "bucket"),
    [
        # Worked by hand: 3:2 -> short = sqrt(1024 * 1024 / 1.5) = 836.1 -> 832, long = 1254.1 -> 1280.
        (Size(2000, 3000), 1024, "pixel_area", Size(832, 1280)),
        (Size(3000, 2000), 1024, "pixel_area", Size(1280, 832)),
        (Size(999, 999), 1024, "pixel_area", Size(1024, 1024)),
        # One megapixel: sqrt(1e6) = 1000 -> 1024; at 16:9 (1.78) 749.5 -> 768 and 1334.2 -> 1344.
        (Size(500, 500), 1.0, "area", Size(1024, 1024)),
        (Size(1080, 1920), 1.0, "area", Size(768, 1344)),
        # The shorter edge is the resolution: 512, and 512 * 1.5 = 768.
        (Size(200, 300), 512, "pixel", Size(512, 768)),
        (Size(300, 200), 512, "pixel", Size(768, 512)),
        # A long edge that is a tie between two multiples goes up: 64 * 1.5 = 96 -> 128.
        (Size(100, 150), 64, "pixel", Size(64, 128)),
    ],
)
def test_bucket_size_matches_hand_computed_sizes(
    image_px: Size, resolution: float, resolution_type: str, bucket: Size
) -> None:
    found = bucket_size(
        image_px, resolution=resolution, resolution_type=resolution_type, alignment=64, aspect_decimals=2
    )
    assert found == bucket


def test_bucket_size_gives_nearly_equal_aspects_one_bucket() -> None:
    sizes = {
        bucket_size(
            Size(1000, width), resolution=1024, resolution_type="pixel", alignment=8, aspect_decimals=1
        )
        for width in (1451, 1500, 1549)
    }
    assert sizes == {Size(1024, 1536)}


@settings(max_examples=1000)
@given(SIZES, st.integers(64, 2048), st.sampled_from(["pixel", "pixel_area"]), ALIGNMENTS)
@pytest.mark.reliability_row(32)
def test_bucket_size_is_aligned_symmetric_and_near_the_resolution(
    image_px: Size, resolution: int, resolution_type: str, alignment: int
) -> None:
    def bucket(size: Size) -> Size:
        return bucket_size(
            size,
            resolution=resolution,
            resolution_type=resolution_type,
            alignment=alignment,
            aspect_decimals=2,
        )

    found, turned = bucket(image_px), bucket(Size(image_px.width, image_px.height))
    assert found.height % alignment == 0 < found.height
    assert found.width % alignment == 0 < found.width
    assert turned == Size(found.width, found.height)
    assert (found.width >= found.height) == (image_px.width >= image_px.height) or found.width == found.height
    short = min(found.height, found.width)
    if resolution_type == "pixel":
        assert abs(short - resolution) <= alignment / 2
    elif short > alignment:
        # Each edge moved by at most half an alignment from a rectangle of the wanted area.
        half = alignment / 2
        assert (found.height - half) * (found.width - half) <= resolution**2 * 1.0001
        assert (found.height + half) * (found.width + half) >= resolution**2 * 0.9999


@pytest.mark.parametrize(
    ("minimum", "resolution_type", "too_small"),
    [
        (150, "pixel", False),
        (151, "pixel", True),
        (173, "pixel_area", False),
        (174, "pixel_area", True),
        (0.03, "area", False),
        (0.031, "area", True),
        (0, "pixel", False),
    ],
)
def test_is_too_small_reads_the_minimum_in_the_unit_of_the_resolution(
    minimum: float, resolution_type: str, too_small: bool
) -> None:
    assert is_too_small(Size(150, 200), minimum, resolution_type) == too_small


@settings(max_examples=1000)
@given(SIZES, SIZES, STYLES, st.integers(0, 100))
@pytest.mark.reliability_row(32)
def test_place_keeps_the_aspect_and_cuts_inside(
    image_px: Size, target_px: Size, style: str, seed: int
) -> None:
    placement = place(image_px, target_px, style=style, rng=Random(seed))
    resized_px, (top, left) = placement.resized_px, placement.top_left
    assert resized_px.height >= target_px.height
    assert resized_px.width >= target_px.width
    assert resized_px.height == target_px.height or resized_px.width == target_px.width
    assert 0 <= top <= resized_px.height - target_px.height
    assert 0 <= left <= resized_px.width - target_px.width
    scale = max(target_px.height / image_px.height, target_px.width / image_px.width)
    assert abs(resized_px.height - image_px.height * scale) <= 0.51
    assert abs(resized_px.width - image_px.width * scale) <= 0.51


@pytest.mark.parametrize(("style", "top_left"), [("center", (0, 50)), ("corner", (0, 0))])
def test_place_puts_the_crop_where_the_style_says(style: str, top_left: tuple[int, int]) -> None:
    placement = place(Size(200, 400), Size(100, 100), style=style, rng=Random(0))
    assert placement.resized_px == Size(100, 200)
    assert placement.top_left == top_left


def test_place_random_reaches_both_ends() -> None:
    lefts = {
        place(Size(10, 12), Size(10, 10), style="random", rng=Random(seed)).top_left[1] for seed in range(50)
    }
    assert lefts == {0, 1, 2}

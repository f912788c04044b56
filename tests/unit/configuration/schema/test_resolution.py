"""Pixel sizes of a resolution."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.schema.resolution import nearest_multiple, square_size
from simpletuner.helpers.contracts import Size


@pytest.mark.parametrize(
    ("resolution", "resolution_type", "edge"),
    [(1000, "pixel", 1024), (500, "pixel_area", 512), (0.25, "area", 512)],
)
def test_square_size_is_the_nearest_aligned_square(
    resolution: float, resolution_type: str, edge: int
) -> None:
    found = square_size(resolution=resolution, resolution_type=resolution_type, alignment=64)
    assert found == Size(edge, edge)


@pytest.mark.parametrize(("edge", "multiple"), [(0.2, 64), (31, 64), (95.9, 64), (96, 128), (128, 128)])
def test_nearest_multiple_is_at_least_one_and_a_tie_goes_up(edge: float, multiple: int) -> None:
    assert nearest_multiple(edge, 64) == multiple

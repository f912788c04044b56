"""Pixel sizes that a resolution of the configuration means, for training and validation alike."""

from __future__ import annotations

import math

from simpletuner.helpers.configuration.schema.datasets import ResolutionType
from simpletuner.helpers.contracts import Size

PIXELS_PER_MEGAPIXEL = 1_000_000


def target_area_px(resolution: float, resolution_type: ResolutionType) -> float:
    """Area of a square image in pixels."""
    return resolution * PIXELS_PER_MEGAPIXEL if resolution_type == "area" else resolution**2


def square_edge_px(resolution: float, resolution_type: ResolutionType) -> float:
    """Edge of a square image in pixels, before alignment."""
    if resolution_type == "pixel":
        return resolution
    return math.sqrt(target_area_px(resolution, resolution_type))


def square_size(*, resolution: float, resolution_type: ResolutionType, alignment: int) -> Size:
    """The bucket of a square image."""
    edge_px = nearest_multiple(square_edge_px(resolution, resolution_type), alignment)
    return Size(height=edge_px, width=edge_px)


def nearest_multiple(edge_px: float, alignment: int) -> int:
    """The multiple of `alignment` nearest to an edge, at least one; a tie goes up."""
    return max(1, math.floor(edge_px / alignment + 0.5)) * alignment

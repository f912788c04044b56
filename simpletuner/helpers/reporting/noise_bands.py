"""The three noise bands of the loss: near the clean image, in between, near pure noise."""

from __future__ import annotations

from bisect import bisect_right

EDGES = (500, 800)
"""Timesteps, of 1000, at which the second and third band begin."""
BANDS = ("0-500", "500-800", "800-1000")


def band_of(timestep: int) -> int:
    """Index of the band of a timestep in [0, 1000]; an edge belongs to the upper band."""
    return bisect_right(EDGES, timestep)

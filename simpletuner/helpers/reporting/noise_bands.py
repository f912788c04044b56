"""The noise levels that losses are told apart by: near the image, in between, near pure noise."""

from __future__ import annotations

from bisect import bisect_right

EDGES = (500, 800)
"""Timesteps at which a new band begins, of 1000."""
BANDS = ("0-500", "500-800", "800-1000")


def band_of(timestep: int) -> int:
    """Index of the band that a timestep in [0, 1000] lies in; an edge belongs to the band above it."""
    return bisect_right(EDGES, timestep)

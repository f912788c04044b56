"""Means with bootstrap intervals over runs, and contenders at equal likeness of the concept.

The bootstrap resamples runs, that is, seeds and concepts together; the intervals hold for these concepts.
Shapes: R runs, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Curves:
    """Measurements of one contender at one rank, by run and step."""

    steps: tuple[int, ...]
    """[S]; the first is 0, the base model."""
    keys: tuple[tuple[str, int], ...]
    """[R] sorted concept and seed of each run; they pair the contenders."""
    values: Mapping[str, Values]
    """Measure -> [R, S]."""

    def at(self, measure: str, step: int) -> Values:
        """[R] values of a measure after a step."""
        return self.values[measure][:, self.steps.index(step)]

    def means(self, measure: str) -> Values:
        """[S] means over the runs."""
        means: Values = self.values[measure].mean(axis=0)
        return means


def collect(records: Sequence[Mapping[str, Any]]) -> Curves:
    """Collect the results of one contender at one rank."""
    ordered = sorted(records, key=lambda record: (record["run"]["concept"], record["run"]["seed"]))
    flat = [[_flat(point) for point in record["points"]] for record in ordered]
    return Curves(
        steps=tuple(int(point["step"]) for point in flat[0]),
        keys=tuple((record["run"]["concept"], record["run"]["seed"]) for record in ordered),
        values={
            measure: np.array([[point[measure] for point in points] for points in flat], dtype=np.float64)
            for measure in flat[0][0]
            if measure != "step"
        },
    )


def estimate(values: Values) -> Estimate:
    """Mean of [R] values with its percentile bootstrap interval."""
    return _interval(float(values.mean()), values[_resampled(len(values))].mean(axis=1))


def difference(one: Values, other: Values) -> Estimate:
    """Mean of the paired differences of two [R], with its interval."""
    return estimate(one - other)


def at_equal(curves: Curves, measure: str, *, likeness: float) -> Estimate | None:
    """A measure at the point where the mean curve first reaches a likeness of the concept.

    None if the curve, or more than one in twenty of its resamplings, does not reach it.
    """
    mean = _crossing(curves.means("concept"), curves.means(measure), likeness)
    if mean is None:
        return None
    concept, other = curves.values["concept"], curves.values[measure]
    found = [
        _crossing(concept[chosen].mean(axis=0), other[chosen].mean(axis=0), likeness)
        for chosen in _resampled(len(curves.keys))
    ]
    reached = [value for value in found if value is not None]
    if len(reached) < 0.95 * len(found):
        return None
    return _interval(mean, np.array(reached))


def common_likenesses(all_curves: Sequence[Curves], *, num: int = 3) -> list[float]:
    """Evenly spaced likenesses within the range that every contender reaches."""
    lowest = max(float(curves.means("concept")[0]) for curves in all_curves)
    highest = min(float(curves.means("concept").max()) for curves in all_curves)
    return [round(float(value), 2) for value in np.linspace(lowest, highest, num + 2)[1:-1]]


def _crossing(concept: Values, other: Values, likeness: float) -> float | None:
    """[S] other, linearly interpolated where [S] concept first reaches a likeness."""
    for index in range(1, len(concept)):
        before, after = concept[index - 1], concept[index]
        if before <= likeness <= after and after > before:
            share = (likeness - before) / (after - before)
            return float(other[index - 1] + share * (other[index] - other[index - 1]))
    return None


def _interval(mean: float, resampled: Values) -> Estimate:
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (outside, 1 - outside))
    return Estimate(mean, float(low), float(high))


def _resampled(num: int) -> NDArray[np.int64]:
    """[RESAMPLES, R] run indices, equal for all contenders, so that differences stay paired."""
    return np.random.default_rng(0).integers(num, size=(RESAMPLES, num))


def _flat(point: Mapping[str, Any]) -> dict[str, float]:
    values = {name: value for name, value in point.items() if name != "loss"}
    return values | {f"loss {band}": value for band, value in point["loss"].items()}

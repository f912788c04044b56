"""Curves over the steps of a run: read from the metrics log, smoothed and downsampled.

Shapes: N logged steps, K points of a curve.
"""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.helpers.reporting.smoothing import RunningMean

MAX_POINTS = 400
"""Per curve; a screen has hardly more pixel columns for it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Log:
    """The numbers of metrics.jsonl, oldest step first: 8 bytes each, for a run may take millions of steps."""

    num_rows: int
    """N."""
    columns: Mapping[tuple[str, ...], array[float]]
    """Name of a field, or names of a nested one -> values; shorter where the last lines lack the field."""

    @property
    def steps(self) -> Floats:
        """[N]."""
        return self.column("step")

    def column(self, *names: str) -> Floats:
        """[N] values of a field or nested field; nan where a line lacks it."""
        values = np.full(self.num_rows, np.nan)
        known = self.columns.get(names, array("d"))
        values[: len(known)] = known
        return values


@dataclass(frozen=True, slots=True)
class Points:
    """A curve to draw: each point covers the steps since the previous point."""

    steps: Floats
    """[K], the last step of each point."""
    means: Floats
    """[K], nan where no step has a value."""
    lows: Floats
    """[K]."""
    highs: Floats
    """[K]."""


def read_log(file: Path) -> Log:
    """Read metrics.jsonl; incomplete lines of a killed run are skipped, a missing file is an empty log."""
    columns: defaultdict[tuple[str, ...], array[float]] = defaultdict(lambda: array("d"))
    num_rows = 0
    with suppress(FileNotFoundError), file.open(encoding="utf-8", errors="replace") as lines:
        for record in _records(lines):
            for names, value in _numbers(record):
                column = columns[names]
                column.extend([np.nan] * (num_rows - len(column)))
                column.append(value)
            num_rows += 1
    return Log(num_rows, columns)


def smooth(values: Floats) -> Floats:
    """[N] running mean over about a twentieth of the run; nan stays nan and is ignored."""
    running = RunningMean(keep=1.0 - 1.0 / min(max(len(values) / 20, 5.0), 500.0))
    means = (running.update(value) if value == value else np.nan for value in values.data)
    return np.fromiter(means, np.float64, count=len(values))


def downsample(steps: Floats, values: Floats, *, max_points: int = MAX_POINTS) -> Points:
    """At most max_points points, each with mean, minimum and maximum of consecutive steps."""
    size = -(-len(steps) // max_points) or 1
    starts = np.arange(0, len(steps), size)
    ends = np.minimum(starts + size, len(steps)) - 1
    is_finite = np.isfinite(values)
    counts = _reduce(np.add, np.where(is_finite, 1.0, 0.0), starts)
    sums = _reduce(np.add, np.where(is_finite, values, 0.0), starts)
    lows = _reduce(np.minimum, np.where(is_finite, values, np.inf), starts)
    highs = _reduce(np.maximum, np.where(is_finite, values, -np.inf), starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / counts
    is_empty = counts == 0
    return Points(
        steps=steps[ends],
        means=np.where(is_empty, np.nan, means),
        lows=np.where(is_empty, np.nan, lows),
        highs=np.where(is_empty, np.nan, highs),
    )


def _reduce(operation: np.ufunc, values: Floats, starts: NDArray[np.int64]) -> Floats:
    result: Floats = operation.reduceat(values, starts) if len(values) else values
    return result


def _records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _numbers(record: Mapping[str, Any], *outer: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """The names of each number in a record, nested ones included, and its value."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, *outer, name)
        elif isinstance(value, int | float):
            yield (*outer, name), float(value)

"""Courses over the steps of a run: read from the log, smoothed, and thinned to what a picture can show.

Shapes: N logged steps, K points of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.helpers.reporting.smoothing import RunningMean

MAX_POINTS = 400
"""Of one curve; a screen has hardly more columns for it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Log:
    """The lines of a metrics file, oldest first."""

    lines: Sequence[dict[str, Any]]

    @property
    def steps(self) -> Floats:
        """[N]."""
        return self.column("step")

    def column(self, *names: str) -> Floats:
        """[N] values of a field, or of a field within a field; nan where a line has none."""
        return np.array([_value(line, names) for line in self.lines], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Points:
    """A curve as it is drawn: each point stands for the steps since the one before."""

    steps: Floats
    """[K], the last step that a point stands for."""
    means: Floats
    """[K], nan where the steps have no value."""
    lows: Floats
    """[K]."""
    highs: Floats
    """[K]."""


def read_log(file: Path) -> Log:
    """The log of a run; a line that a killed run tore is passed over, a file that is missing is empty."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return Log(())
    return Log(tuple(_records(text.splitlines())))


def smooth(values: Floats) -> Floats:
    """[N] running mean over about a twentieth of the run; nan stays nan and does not count."""
    running = RunningMean(keep=1.0 - 1.0 / min(max(len(values) / 20, 5.0), 500.0))
    return np.array([running.update(value) if value == value else np.nan for value in values.tolist()])


def downsample(steps: Floats, values: Floats, *, max_points: int = MAX_POINTS) -> Points:
    """At most max_points points, each the mean, minimum and maximum of neighbouring steps."""
    size = -(-len(steps) // max_points) or 1
    starts = np.arange(0, len(steps), size)
    ends = np.minimum(starts + size, len(steps)) - 1
    is_there = np.isfinite(values)
    counts = _each(np.add, np.where(is_there, 1.0, 0.0), starts)
    sums = _each(np.add, np.where(is_there, values, 0.0), starts)
    lows = _each(np.minimum, np.where(is_there, values, np.inf), starts)
    highs = _each(np.maximum, np.where(is_there, values, -np.inf), starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / counts
    absent = counts == 0
    return Points(
        steps=steps[ends],
        means=np.where(absent, np.nan, means),
        lows=np.where(absent, np.nan, lows),
        highs=np.where(absent, np.nan, highs),
    )


def _each(operation: np.ufunc, values: Floats, starts: NDArray[np.int64]) -> Floats:
    result: Floats = operation.reduceat(values, starts) if len(values) else values
    return result


def _records(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _value(line: dict[str, Any], names: tuple[str, ...]) -> float:
    value: Any = line
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else np.nan

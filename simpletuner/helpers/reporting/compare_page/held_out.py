"""The losses of held-out images of runs that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simpletuner.helpers.contracts import ComparedColumn
from simpletuner.helpers.io.run_folder import EVALUATIONS_FILE
from simpletuner.helpers.reporting.html_report.series import read_log

MEASURE = "Held-out loss"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss of held-out images after one step of a run."""

    loss: float
    measured: tuple[float, str]
    """The number of the images and captions, and the loss of the base model, which shows loss and weights of
    the run: only losses that have both alike are compared."""


@dataclass(frozen=True, slots=True)
class Lowest:
    """The lowest of some losses that can be compared."""

    column: ComparedColumn
    loss: float
    num_compared: int


def held_out_of(run: Path) -> dict[int, HeldOut]:
    """Step -> loss after it, of a run that evaluated; empty for others and where its folder is gone."""
    log = read_log(run / EVALUATIONS_FILE)
    losses, sets = log.column("eval_loss"), np.nan_to_num(log.column("image_set"), nan=-1)
    rows = [row for row in zip(log.steps, losses, sets, strict=True) if np.isfinite(row[1])]
    bases = {number: f"{loss:.4g}" for step, loss, number in rows if step == 0}
    return {
        int(step): HeldOut(float(loss), (float(number), bases.get(number, str(run))))
        for step, loss, number in rows
    }


def losses_of(columns: Sequence[ComparedColumn]) -> dict[int, HeldOut]:
    """Index of a column -> its loss, of checkpoints as they were trained."""
    runs = {column.run: held_out_of(column.run) for column in columns if column.run is not None}
    return {
        index: runs[column.run][column.step]
        for index, column in enumerate(columns)
        if column.is_as_trained and column.run in runs and column.step in runs[column.run]
    }


def lowest_of(columns: Sequence[ComparedColumn], losses: Mapping[int, HeldOut]) -> list[Lowest]:
    """The lowest of the losses that can be compared, in the order of the columns."""
    alike: dict[tuple[float, str], list[int]] = {}
    for index, each in losses.items():
        alike.setdefault(each.measured, []).append(index)
    found = []
    for indices in alike.values():
        best = min(indices, key=lambda index: losses[index].loss)
        found.append(Lowest(columns[best], losses[best].loss, len(indices)))
    return found


def lower_elsewhere(columns: Sequence[ComparedColumn], losses: Mapping[int, HeldOut]) -> list[str]:
    """For each run whose loss was lower after a step that is not compared, a sentence."""
    sentences = []
    for run in dict.fromkeys(column.run for column in columns if column.run is not None):
        own = {columns[index].step: each for index, each in losses.items() if columns[index].run == run}
        if not own:
            continue
        measured = [*own.values()][-1].measured
        every = {
            step: each.loss
            for step, each in held_out_of(run).items()
            if each.measured == measured and step > 0
        }
        best = min(every, key=lambda step: every[step], default=None)
        if best is not None and every[best] < min(each.loss for each in own.values()):
            name = next(column.title for column in columns if column.run == run).partition(", step")[0]
            sentences.append(
                f"{name} had its lowest held-out loss, {every[best]:.5f}, after step {best:,}, of which "
                "no checkpoint is compared."
            )
    return sentences

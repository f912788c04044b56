"""Trains a run and writes its memory every 100 steps: `python memory_of_a_run.py CONFIG FILE [--trace]`.

With --trace, which takes longer, the file names the lines of code whose memory grew instead.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.training.build import build_trainer
from simpletuner.helpers.training.trainer import Trainer

STEPS_BETWEEN = 100
STATUS = Path("/proc/self/status")
SHOWN = 15


def anonymous_mib() -> float:
    """Memory of this process that no file backs (RssAnon), in MiB."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def growth(measured: list[tuple[int, float]], *, since: int) -> float:
    """Slope of the memory after a step by least squares, in MiB per 1,000 steps.

    Args:
        measured: (step, MiB) of each measurement.
        since: Later measurements count.
    """
    steps, mib = np.array([each for each in measured if each[0] > since]).T
    return float(np.polyfit(steps, mib, 1)[0]) * 1000


def train(trainer: Trainer, after_step: Callable[[int], None]) -> None:
    """Train to the end and call `after_step` with the number of each step."""
    update = trainer.display.update

    def noted(metrics: StepMetrics) -> None:
        update(metrics)
        after_step(metrics.step)

    with mock.patch.object(trainer.display, "update", noted):
        assert trainer.run() == 0


def measure(trainer: Trainer) -> str:
    """A JSON list of (step, MiB)."""
    measured: list[tuple[int, float]] = []

    def note(step: int) -> None:
        if step % STEPS_BETWEEN == 0:
            measured.append((step, anonymous_mib()))

    train(trainer, note)
    return json.dumps(measured)


def trace(trainer: Trainer) -> str:
    """The lines of code whose memory grew after the first third of a run, and the peak of each third.

    Only Python's own memory. The peak alone shows a part that reads more and more at once and frees it again.
    """
    third = trainer.max_steps // 3
    snapshots, peaks_mib = [], []

    def note(step: int) -> None:
        if step % third == 0:
            gc.collect()
            peaks_mib.append(f"{tracemalloc.get_traced_memory()[1] / 2**20:.2f}")
            snapshots.append(tracemalloc.take_snapshot())
            tracemalloc.reset_peak()

    tracemalloc.start()
    train(trainer, note)
    differences = snapshots[-1].compare_to(snapshots[0], "lineno")[:SHOWN]
    return "\n".join([f"peak of each third, MiB: {', '.join(peaks_mib)}", *map(str, differences)])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run = build_trainer(load_config(Path(sys.argv[1]), families=registry.specs()))
    assert isinstance(run, Trainer)
    Path(sys.argv[2]).write_text(trace(run) if "--trace" in sys.argv else measure(run))

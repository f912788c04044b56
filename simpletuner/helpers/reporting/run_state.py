"""How a run of an output folder stands, by its files: state, step, time left, newest validation."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpletuner.helpers.checkpointing.checkpoints import current_checkpoints
from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.atomic import write_bytes
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.json_files import read_object
from simpletuner.helpers.io.lock import is_held
from simpletuner.helpers.io.run_folder import (
    CONFIG_FILE,
    EXIT_FILE,
    GRID_FILE,
    METRICS_FILE,
    PROGRESS_FILE,
    RUN_MANIFEST_FILE,
    SUMMARY_FILE,
    VALIDATION_FOLDER,
    validation_step_folders,
)

State = Literal["running", "finished", "stopped", "failed", "died"]
"""stopped: by a signal or a request, after a checkpoint; failed: with an error; died: killed."""


class NoRunError(SimpleTunerError):
    """The folder is not the output_dir of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """How a run stands."""

    path: Path
    state: State
    step: int
    max_steps: int | None
    """None before the first step."""
    left_s: float | None
    """Of a running run, validations included; None until its first steps."""
    age_s: float
    """Since the run last wrote how it stands."""
    grid: Path | None
    """Of the newest validation."""


def save_progress(output_dir: Path, *, step: int, left_s: float | None) -> None:
    """Note how far the run is; a file that cannot be written costs the run nothing."""
    with suppress(StorageError):
        content = json.dumps({"step": step, "left_s": left_s}).encode()
        write_bytes(output_dir / PROGRESS_FILE, content, durable=False)


MAX_LEFT_S = 1e9
"""Of a time left; a longer one is damage."""


def read_status(path: Path) -> RunStatus:
    """How the run of an output folder stands."""
    progress = read_object(path / PROGRESS_FILE)
    step, left_s = progress.get("step"), progress.get("left_s")
    known = step if isinstance(step, int) and not isinstance(step, bool) else saved_step(path)
    step = max(known, finished_step(path), 0)
    has_time = isinstance(left_s, int | float) and 0 <= left_s < MAX_LEFT_S
    state, max_steps = state_of(path, step), read_object(path / RUN_MANIFEST_FILE).get("max_steps")
    grids = [folder / GRID_FILE for _, folder in validation_step_folders(path / VALIDATION_FOLDER)]
    return RunStatus(
        path=path,
        state=state,
        step=step,
        max_steps=max_steps if isinstance(max_steps, int) else None,
        left_s=left_s if state == "running" and has_time else None,
        age_s=_age_s(path),
        grid=next((grid for grid in reversed(grids) if grid.exists()), None),
    )


def state_of(path: Path, step: int) -> State:
    """The state of a run that has taken this many optimiser steps."""
    if step > 0 and step == finished_step(path):
        return "finished"
    if is_held(path):
        return "running"
    end = read_object(path / EXIT_FILE)
    if not end:
        return "died"
    return "failed" if end.get("outcome") == "failed" else "stopped"


def saved_step(path: Path) -> int:
    """The step of the newest checkpoint or of the end, whichever is higher."""
    return max(*(checkpoint.step for checkpoint in current_checkpoints(path)), finished_step(path), 0)


def finished_step(path: Path) -> int:
    """The last step of a finished run, else 0."""
    step = read_object(path / SUMMARY_FILE).get("step")
    return step if isinstance(step, int) else 0


def _age_s(path: Path) -> float:
    for name in (PROGRESS_FILE, METRICS_FILE, CONFIG_FILE):
        with suppress(OSError):
            return max(time.time() - (path / name).stat().st_mtime, 0.0)
    return math.inf

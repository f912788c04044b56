"""Reads the output folder of a run for the report; missing or damaged files are left out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from simpletuner.helpers.checkpointing.changes import load_changes
from simpletuner.helpers.checkpointing.checkpoints import current_checkpoints
from simpletuner.helpers.configuration.text.secrets import without_secrets
from simpletuner.helpers.io.json_files import read_object
from simpletuner.helpers.io.redaction import hide_named
from simpletuner.helpers.io.run_folder import (
    COMFYUI_FILE,
    CONFIG_FILE,
    EMA_FILES,
    EVALUATIONS_FILE,
    METRICS_FILE,
    RUN_MANIFEST_FILE,
    SCORES_FILE,
    VALIDATION_FOLDER,
    adapter_in,
    ema_folder,
    model_files,
    validation_step_folders,
)
from simpletuner.helpers.reporting.html_report.gallery import ImageRow, image_rows
from simpletuner.helpers.reporting.html_report.series import Log, read_log
from simpletuner.helpers.reporting.run_state import NoRunError, State, saved_step, state_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSnapshot:
    """The content of an output folder at one moment."""

    path: Path
    state: State
    written: str
    """Local time of the reading."""
    step: int
    """Optimiser steps so far; the log lacks the last ones of a run whose disk was full."""
    log: Log
    evaluations: Log
    """The losses of held-out images."""
    config: Mapping[str, Any]
    """Resolved configuration; empty if unreadable."""
    manifest: Mapping[str, Any]
    """The content of run.json; empty for runs of earlier versions."""
    images: list[ImageRow]
    clip_scores: Mapping[int, float]
    """Step of each scored validation -> mean of its images."""
    ema_clip_scores: Mapping[int, float]
    """The same of its images of the EMA weights."""
    adapter: Path | None
    """The final adapter or the folder of the whole model, else that of the newest checkpoint."""
    beside_adapter: Path | None
    """Of a run with an EMA, the file beside `adapter`."""
    comfyui: Path | None
    changes: list[dict[str, Any]]
    """See `load_changes`."""

    @property
    def max_steps(self) -> int | None:
        """Planned number of steps, if known."""
        return self.manifest.get("max_steps") or self.config.get("max_train_steps")


def read_run(path: Path, *, state: State | None = None, step: int | None = None) -> RunSnapshot:
    """Read an output folder; without `state` and `step`, its files tell them.

    Raises:
        NoRunError: The folder holds neither a metrics log nor a configuration.
    """
    if not (path / METRICS_FILE).exists() and not (path / CONFIG_FILE).exists():
        raise NoRunError(
            f"{path} holds neither {METRICS_FILE} nor {CONFIG_FILE}. Give the output_dir of a run."
        )
    config = read_object(path / CONFIG_FILE)
    hide_named(json.dumps(config))  # the paths of the run hold the values
    manifest = without_secrets(read_object(path / RUN_MANIFEST_FILE))
    log = read_log(path / METRICS_FILE)
    images = image_rows(
        path / VALIDATION_FOLDER, manifest.get("shots", []), compared_with=manifest.get("compared_with")
    )
    if step is None:
        step = _step(path, log)
    adapter = _adapter(path, is_token=config.get("model_type") == "embedding")
    return RunSnapshot(
        path=path,
        state=state or state_of(path, step),
        step=step,
        written=time.strftime("%Y-%m-%d %H:%M"),
        log=log,
        evaluations=read_log(path / EVALUATIONS_FILE),
        config=without_secrets(config),
        manifest=manifest,
        images=images,
        clip_scores=_clip_scores(path / VALIDATION_FOLDER, "clip_score"),
        ema_clip_scores=_clip_scores(path / VALIDATION_FOLDER, "ema_clip_score"),
        adapter=adapter,
        beside_adapter=_beside(adapter) if config.get("use_ema") else None,
        comfyui=path / COMFYUI_FILE if (path / COMFYUI_FILE).exists() else None,
        changes=without_secrets(load_changes(path)),
    )


def relative_path(path: str | Path) -> str:
    """The path relative to the working directory; unchanged if it is outside, or a URL."""
    if "://" in str(path):
        return str(path)
    try:
        relative = os.path.relpath(path)
    except ValueError:  # on another drive of Windows
        return str(path)
    return str(path) if relative.startswith(os.pardir) else relative


def display_path(path: str | Path) -> str:
    """Path for display, with the home folder shortened to ~."""
    home = str(Path.home())
    text = relative_path(path)
    return f"~{text.removeprefix(home)}" if text.startswith(home + os.sep) else text


def _clip_scores(validation: Path, name: str) -> dict[int, float]:
    files = ((step, folder / SCORES_FILE) for step, folder in validation_step_folders(validation))
    found = ((step, read_object(file).get(name)) for step, file in files)
    return {step: fmean(each.values()) for step, each in found if isinstance(each, dict) and each}


def _step(path: Path, log: Log) -> int:
    """The step of the newest checkpoint, of the last row or of the end, whichever is highest."""
    return max(*(int(step) for step in log.steps[-1:]), saved_step(path), 0)


def _adapter(path: Path, *, is_token: bool) -> Path | None:
    folders = [path, *(checkpoint.path for checkpoint in current_checkpoints(path))]
    for folder in folders:
        if (file := adapter_in(folder, is_token=is_token)) is not None:
            return file
        if weights := model_files(folder):
            return weights[0].parent
    return None


def _beside(adapter: Path | None) -> Path | None:
    if adapter is None:
        return None
    file = adapter.with_name(ema_folder(adapter.name) if adapter.is_dir() else EMA_FILES[adapter.name])
    return file if file.exists() else None

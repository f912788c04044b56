"""The runs in a folder, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len

from simpletuner.helpers.adapters.files.finding import RUNS
from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.io.lock import is_held
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.paths import portable
from simpletuner.helpers.io.run_folder import CHECKPOINT_MANIFEST_FILE, CONFIG_FILE, METRICS_FILE
from simpletuner.helpers.reporting.html_report.markup import format_duration
from simpletuner.helpers.reporting.run_state import NoRunError, RunStatus, read_status

DEPTHS = ("", "*/", "*/*/")
"""Runs are looked for in a folder and in two levels of folders below it."""
MAX_NAME_BYTES = 255
"""Of a file system; a longer name is an error of its own there."""
HEADS = ("RUN", "STATE", "STEP", "LEFT", "LAST NEWS", "LAST GRID")


def find_run(path: Path) -> Path:
    """The output folder of a run, by its path or its name below RUNS.

    Raises:
        NoRunError: There is none.
    """
    path = portable(path)
    if len(path.name.encode()) > MAX_NAME_BYTES:
        raise NoRunError(f"{_shown(path)[:60]}…: no folder has so long a name. Give the output_dir of a run.")
    folder = path if path.exists() else RUNS / path
    if is_run(folder) or is_held(folder):
        return folder
    if not folder.exists():
        known = list_runs(RUNS) if RUNS.is_dir() else []
        hint = nearest(path.name, [status.path.name for status in known])
        raise NoRunError(f"{_shown(path)}: no such folder.{hint} Give the output_dir of a run, or its name.")
    raise NoRunError(
        f"{_shown(folder)} holds neither {METRICS_FILE} nor {CONFIG_FILE}. Give the output_dir of a run."
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is the output_dir of a run, and not one of its checkpoints."""
    has_files = any((folder / name).is_file() for name in (METRICS_FILE, CONFIG_FILE))
    return has_files and not (folder / CHECKPOINT_MANIFEST_FILE).exists()


def list_runs(folder: Path) -> list[RunStatus]:
    """The runs in a folder and below it, the one that wrote last first.

    Raises:
        NoRunError: There is no such folder.
    """
    if len(folder.name.encode()) > MAX_NAME_BYTES or not folder.is_dir():
        raise NoRunError(
            f"{_shown(folder)[:200]}: no such folder. Give the folder with the output_dir of your runs."
        )
    files = (file for depth in DEPTHS for file in folder.glob(f"{depth}{CONFIG_FILE}"))
    runs = (read_status(file.parent) for file in files if is_run(file.parent))
    return sorted(runs, key=lambda run: run.age_s)


def table(runs: Sequence[RunStatus], *, below: Path) -> list[str]:
    """A line for each run below its heads; columns are as wide on the screen as their widest text."""
    rows = [HEADS, *(_cells(run, below) for run in runs)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    padded = (
        (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return ["  ".join(row).rstrip() for row in padded]


def _cells(run: RunStatus, below: Path) -> tuple[str, ...]:
    return (
        _shown(run.path.relative_to(below)),
        run.state,
        f"{run.step:,}" if run.max_steps is None else f"{run.step:,} of {run.max_steps:,}",
        "" if run.left_s is None else format_duration(run.left_s),
        f"{format_duration(run.age_s)} ago",
        "" if run.grid is None else _shown(run.grid),
    )


def _shown(path: Path) -> str:
    return printable(str(path))

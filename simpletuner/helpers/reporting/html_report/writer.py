"""Keeps the HTML report of a run up to date while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.logs import log_once
from simpletuner.helpers.io.run_folder import RUN_MANIFEST_FILE
from simpletuner.helpers.reporting.html_report.page import write_page
from simpletuner.helpers.reporting.run_state import State

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.02
"""Of a run's time that goes into its report."""
OLD_S = 60.0
"""Age of a report that is written again although nothing but steps is new."""
SHARE_OF_STEPS = 0.005
"""Of a run's time that goes into such reports."""


@dataclass(slots=True)
class RunPage:
    """Writes the report; a failure to write it logs a warning and never ends the run.

    A context manager around the run: it writes the run information first, and the report of a failed run.
    """

    output_dir: Path
    is_enabled: bool
    """On the main process."""
    manifest: Callable[[], Mapping[str, Any]] = dict
    """The run information, see `build_manifest`."""
    step: Callable[[], int] | None = None
    """Optimiser steps so far; without it, the files of the folder tell them."""
    _next_s: float = 0.0
    _old_s: float = 0.0

    def __enter__(self) -> Self:
        if self.is_enabled and self._best_effort(
            lambda: write_json(self.output_dir / RUN_MANIFEST_FILE, self.manifest())
        ):
            self.refresh()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SimpleTunerError):
            self.write("failed")

    @property
    def is_old(self) -> bool:
        """Whether the report of the running run is older than OLD_S, or than its writing time allows."""
        return self.is_enabled and time.monotonic() >= self._old_s

    def refresh(self) -> None:
        """Write the report of the running run, unless its share of the run's time is used up."""
        if self.is_enabled and time.monotonic() >= self._next_s:
            started_s = time.monotonic()
            self.write("running")
            took_s = time.monotonic() - started_s
            self._next_s = time.monotonic() + took_s / LARGEST_SHARE
            self._old_s = started_s + max(OLD_S, took_s / SHARE_OF_STEPS)

    def write(self, state: State) -> Path | None:
        """Write the report of the run in this state; None when that failed or is disabled."""
        files: list[Path] = []
        if self.is_enabled:
            step = None if self.step is None else self.step()
            self._best_effort(lambda: files.append(write_page(self.output_dir, state=state, step=step)))
        return files[0] if files else None

    def _best_effort(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - named boundary: a page must never end a run
            log_once(logger.warning, f"The report was not written: {type(error).__name__}: {error}")
            return False
        return True

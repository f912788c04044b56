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
from simpletuner.helpers.io.run_folder import RUN_MANIFEST_FILE
from simpletuner.helpers.reporting.html_report.folder import State
from simpletuner.helpers.reporting.html_report.page import write_page

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.02
"""Of a run's time that goes into its report."""


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

    def refresh(self) -> None:
        """Write the report of the running run, unless its share of the run's time is used up."""
        if self.is_enabled and time.monotonic() >= self._next_s:
            started_s = time.monotonic()
            self.write("running")
            took_s = time.monotonic() - started_s
            self._next_s = time.monotonic() + took_s / LARGEST_SHARE

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
            logger.warning("The report was not written: %s: %s", type(error).__name__, error)
            return False
        return True

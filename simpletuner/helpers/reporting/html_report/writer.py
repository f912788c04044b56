"""Keeps the page of a run up to date while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import RUN_MANIFEST_FILE
from simpletuner.helpers.reporting.html_report.folder import State
from simpletuner.helpers.reporting.html_report.manifest import build_manifest
from simpletuner.helpers.reporting.html_report.page import write_page

if TYPE_CHECKING:
    from simpletuner.helpers.training.trainer import Trainer

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.02
"""Of the time of a run that may go into its page."""


@dataclass(slots=True)
class RunPage:
    """Writes the page; a page that cannot be made costs a warning, never the run."""

    output_dir: Path
    is_enabled: bool
    """Only one process writes."""
    _next_s: float = 0.0

    def begin(self, trainer: Trainer) -> None:
        """Note what the run says about itself, and show that it runs."""
        if self.is_enabled and self._guarded(
            lambda: write_json(self.output_dir / RUN_MANIFEST_FILE, build_manifest(trainer))
        ):
            self.refresh()

    def refresh(self) -> None:
        """Bring the page up to date, unless that was done so lately that it would slow the run down."""
        if self.is_enabled and time.monotonic() >= self._next_s:
            started_s = time.monotonic()
            self.write("running")
            took_s = time.monotonic() - started_s
            self._next_s = time.monotonic() + took_s / LARGEST_SHARE

    def write(self, state: State) -> Path | None:
        """Write the page of a run in this state; None when that failed, or is another process's part."""
        files: list[Path] = []
        if self.is_enabled:
            self._guarded(lambda: files.append(write_page(self.output_dir, state=state)))
        return files[0] if files else None

    def _guarded(self, make: Callable[[], None]) -> bool:
        try:
            make()
        except Exception as error:  # noqa: BLE001 - named boundary: a page must never end a run
            logger.warning("The report was not written: %s: %s", type(error).__name__, error)
            return False
        return True

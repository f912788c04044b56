"""What a run left behind, and the mark that it is finished."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import SUMMARY_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """Where everything of a finished run lies; its file is written last."""

    step: int
    adapter: str
    checkpoint: str
    metrics: str
    config: str
    grid: str | None
    """None when no validation was asked for, or the last one failed."""
    comfyui: str | None = None
    """The plain LoRA for ComfyUI; None when none was asked for."""
    page: str | None = None
    """The page that shows the run; None when it could not be written, or before there was one."""

    def save(self, output_dir: Path) -> None:
        """Mark the run in this folder as finished."""
        write_json(output_dir / SUMMARY_FILE, asdict(self))

    def show(self) -> None:
        """Log one line for each thing the run made."""
        logger.info("Adapter:     %s", self.adapter)
        if self.comfyui is not None:
            logger.info("For ComfyUI: %s", self.comfyui)
        if self.grid is not None:
            logger.info("Pictures:    %s", self.grid)
        if self.page is not None:
            logger.info("Report:      %s", self.page)
        logger.info("Checkpoint:  %s", self.checkpoint)
        logger.info("Metrics:     %s", self.metrics)
        logger.info("Config:      %s", self.config)


def load_report(output_dir: Path) -> Report | None:
    """The report of the finished run in a folder; None when there is none that can be read."""
    try:
        return Report(**json.loads((output_dir / SUMMARY_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that has nothing left to do."""

    report: Report
    max_steps: int

    def run(self) -> int:
        """Say that the run is finished and how to start another; the exit code is 0."""
        logger.info(
            "This run is finished: step %d of %d. Raise max_train_steps to train longer, "
            "or set another output_dir to start a new run.",
            self.report.step,
            self.max_steps,
        )
        self.report.show()
        return 0

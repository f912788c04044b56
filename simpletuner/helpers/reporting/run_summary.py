"""The summary of a finished run: its file marks the run as finished."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.run_folder import SUMMARY_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Paths of a finished run's files."""

    step: int
    adapter: str
    checkpoint: str
    metrics: str
    config: str
    grid: str | None
    """None without validation images, or when the last validation failed."""
    comfyui: str | None = None
    """The adapter in ComfyUI's layout, if lora_format asks for it."""
    comfyui_advice: str | None = None
    """Whether ComfyUI reads the adapter file, and what to use instead; None for runs of earlier versions."""
    page: str | None = None
    """The HTML report; None when it could not be written, and for runs of earlier versions."""

    trackers: dict[str, str] | None = None
    """Tracker -> the folder of its files; None for runs of earlier versions."""

    def save(self, output_dir: Path) -> None:
        """Mark the run in this folder as finished."""
        write_json(output_dir / SUMMARY_FILE, asdict(self))

    def show(self) -> None:
        """Log one line for each file."""
        logger.info("Adapter:     %s", self.adapter)
        if self.comfyui_advice is not None:
            logger.info("ComfyUI:     %s", self.comfyui_advice)
        if self.grid is not None:
            logger.info("Images:      %s", self.grid)
        if self.page is not None:
            logger.info("Report:      %s", self.page)
        logger.info("Checkpoint:  %s", self.checkpoint)
        logger.info("Metrics:     %s", self.metrics)
        for tracker, folder in (self.trackers or {}).items():
            logger.info("%-12s %s", f"{tracker.capitalize()}:", folder)
        logger.info("Config:      %s", self.config)


def load_summary(output_dir: Path) -> RunSummary | None:
    """The summary in a folder; None when it is missing or unreadable."""
    try:
        return RunSummary(**json.loads((output_dir / SUMMARY_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Stands in for the trainer of a run that has no steps left."""

    summary: RunSummary
    max_steps: int

    def run(self) -> int:
        """Log that the run is finished and how to train on; returns exit code 0."""
        step, wanted = self.summary.step, self.max_steps
        more = f"{counted(step, 'step')}, more than the {wanted} it is asked for"
        logger.info(
            "This run is finished: %s. Raise max_train_steps%s to train longer, or set another output_dir to "
            "start a new run.",
            f"step {step} of {wanted}" if step == wanted else more,
            "" if step == wanted else f" above {step}",
        )
        self.summary.show()
        return 0

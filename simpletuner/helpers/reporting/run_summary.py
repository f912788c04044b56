"""The summary of a finished run: its file marks the run as finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.helpers.io.atomic import damaged_files, file_entry, verify_manifest, write_json
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.redaction import redacted_json
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    COMFYUI_FILES,
    EMA_FILES,
    EMBEDDING_FILE,
    SUMMARY_FILE,
    ema_folder,
)
from simpletuner.helpers.publishing.uploads import Uploads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Paths of a finished run's files; redacted when they are saved."""

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

    card: str | None = None
    """The model card; None when it could not be written, and for runs of earlier versions."""

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> size and SHA-256 of the adapter files and their exports; empty for runs of earlier versions."""

    trackers: dict[str, str] | None = None
    """Tracker -> the folder of its files; None for runs of earlier versions."""
    model: str | None = None
    """Name of the folder of a whole model, whose path `adapter` then is; None for an adapter."""
    ema: str | None = None
    """The file beside the adapter, if it has the EMA weights."""
    plain: str | None = None
    """The file beside the adapter, if the adapter file has the EMA weights and this one the trained ones."""
    held_out: str | None = None
    """When the loss of held-out images was lowest, in words; None for a run that evaluated none."""
    embedding: str | None = None
    """The file of the new token beside the adapter; a token that was trained alone is the adapter itself."""

    @property
    def kind(self) -> str:
        """What `adapter` is, in words."""
        if self.model is not None:
            return "Model"
        return "New token" if Path(self.adapter).name == EMBEDDING_FILE else "Adapter"

    @property
    def adapter_files(self) -> list[str]:
        """Names of the files of the weights without exports, or of the folders of a whole model."""
        has_two = self.ema is not None or self.plain is not None
        if self.model is not None:
            return [self.model, *([ema_folder(self.model)] if has_two else [])]
        mains = [EMBEDDING_FILE]
        if not self.adapter.endswith(EMBEDDING_FILE):
            mains = [ADAPTER_FILE, *([] if self.embedding is None else [EMBEDDING_FILE])]
        return mains + ([EMA_FILES[name] for name in mains] if has_two else [])

    def sealed(self, output_dir: Path) -> RunSummary:
        """The summary with the present size and hash of the adapter files; a model's folder has its own."""
        if self.model is not None:
            return self
        names = self.adapter_files
        if self.comfyui is not None:
            names += [COMFYUI_FILES[name] for name in names if name in COMFYUI_FILES]
        return replace(self, files={name: file_entry(output_dir / name) for name in names})

    def save(self, output_dir: Path) -> None:
        """Mark the run in this folder as finished."""
        write_json(output_dir / SUMMARY_FILE, redacted_json(asdict(self)))

    def damage(self, output_dir: Path) -> list[str]:
        """One sentence for each file of the weights that is missing or damaged; the export too."""
        if self.model is not None:
            problems = {name: verify_manifest(output_dir / name) for name in self.adapter_files}
            return [f"{name}: {problem}" for name, each in problems.items() for problem in each]
        if not self.files:
            return [] if (output_dir / ADAPTER_FILE).is_file() else [f"{ADAPTER_FILE} is missing"]
        try:
            return damaged_files(output_dir, self.files)
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{SUMMARY_FILE} is damaged"]

    def show(self) -> None:
        """Log one line for each file."""
        logger.info("%-12s %s", f"{self.kind}:", self.adapter)
        if self.embedding is not None:
            logger.info("New token:   %s", self.embedding)
        if self.ema is not None:
            logger.info("EMA:         %s", self.ema)
        if self.plain is not None:
            logger.info("Plain:       %s (the %s is the EMA)", self.plain, self.kind.lower())
        if self.comfyui_advice is not None:
            logger.info("ComfyUI:     %s", self.comfyui_advice)
        if self.grid is not None:
            logger.info("Images:      %s", self.grid)
        if self.page is not None:
            logger.info("Report:      %s", self.page)
        if self.card is not None:
            logger.info("Model card:  %s", self.card)
        if self.held_out is not None:
            logger.info("Held out:    %s", self.held_out)
        logger.info("Checkpoint:  %s", self.checkpoint)
        logger.info("Metrics:     %s", self.metrics)
        for tracker, folder in (self.trackers or {}).items():
            logger.info("%-12s %s", f"{tracker.capitalize()}:", folder)
        logger.info("Config:      %s", self.config)


def load_summary(output_dir: Path) -> RunSummary | None:
    """The summary in a folder; None when it is missing or unreadable."""
    try:
        summary = RunSummary(**json.loads((output_dir / SUMMARY_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return summary if isinstance(summary.step, int) else None


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Stands in for the trainer of a run that has no steps left."""

    summary: RunSummary
    max_steps: int
    uploads: Uploads

    def run(self) -> int:
        """Log that the run is finished, upload what is missing; returns exit code 0."""
        step, wanted = self.summary.step, self.max_steps
        more = f"{counted(step, 'step')}, more than the {wanted} it is asked for"
        logger.info(
            "This run is finished: %s. Raise max_train_steps%s to train longer, or set another output_dir to "
            "start a new run.",
            f"step {step} of {wanted}" if step == wanted else more,
            "" if step == wanted else f" above {step}",
        )
        self.summary.show()
        with self.uploads:
            self.uploads.request()
        return 0

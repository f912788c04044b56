"""Trackers: the local JSONL log, which every run has, and those of report_to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from PIL import Image

from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.io.atomic import write_json, write_text
from simpletuner.helpers.io.optional import require
from simpletuner.helpers.io.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_FILE
from simpletuner.helpers.reporting.metrics import StepMetrics

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import TrackingConfig

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records a run."""

    def start(self) -> None:
        """Open the tracker, once, before the first log."""

    def log(self, record: StepMetrics) -> None:
        """Record one optimiser step."""

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Record validation images: label -> file."""

    def finish(self) -> None:
        """Close the tracker."""


class JsonLines:
    """One JSON object per optimiser step."""

    def __init__(self, file: Path, *, resumed_step: int) -> None:
        self._file = file
        self._resumed_step = resumed_step

    def start(self) -> None:
        """Remove the lines after the step that the run resumes from."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        kept = [line for line in lines if 0 < _step_of(line) <= self._resumed_step]
        write_text(self._file, "".join(f"{line}\n" for line in kept))

    def log(self, record: StepMetrics) -> None:
        """Append one line and hand it to the operating system."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Nothing: the images are files already."""

    def finish(self) -> None:
        """Nothing: the file is closed after each line."""


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return -1


class TensorBoard:
    """TensorBoard event files in `<output_dir>/tensorboard`."""

    def __init__(self, *, output_dir: Path, resumed_step: int, **_: object) -> None:
        self._folder = output_dir / TENSORBOARD_FOLDER
        self._resumed_step = resumed_step
        self._writer: Any = None

    def start(self) -> None:
        """Open the event file and hide earlier events after the resumed step."""
        module = require("torch.utils.tensorboard", extra="track")
        self._writer = module.SummaryWriter(str(self._folder), purge_step=self._resumed_step + 1)

    def log(self, record: StepMetrics) -> None:
        """Add one point to each curve."""
        for name, value in record.curves.items():
            self._writer.add_scalar(f"train/{name}", value, record.step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Add images at a step."""
        for label, path in images.items():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"validation/{label}", pixels, step, dataformats="HWC")
        self._writer.flush()

    def finish(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """Weights & Biases; the output folder keeps the run's id, so a resumed run continues it."""

    def __init__(
        self, *, config: TrackingConfig, output_dir: Path, settings: Mapping[str, object], **_: object
    ) -> None:
        self._wandb: Any = require("wandb", extra="track")
        self._config = config
        self._output_dir = output_dir
        self._settings = dict(settings)
        self._run: Any = None

    def start(self) -> None:
        """Open the run, online or offline by WANDB_MODE."""
        id_file = self._output_dir / WANDB_FILE
        run_id = json.loads(id_file.read_bytes())["id"] if id_file.exists() else None
        self._run = self._wandb.init(
            project=self._config.tracker_project_name,
            name=self._config.tracker_run_name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(self._output_dir),
            config=self._settings,
            settings=self._wandb.Settings(init_timeout=60, console="off"),
        )
        write_json(id_file, {"id": self._run.id})

    def log(self, record: StepMetrics) -> None:
        """Add one point to each curve."""
        curves = {f"train/{name}": value for name, value in record.curves.items()}
        self._run.log(curves, step=record.step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Upload images at a step."""
        uploads = [self._wandb.Image(str(path), caption=label) for label, path in images.items()]
        self._run.log({"validation": uploads}, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


class Trackers:
    """All trackers of a run; one that fails is removed with a warning and never ends the run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def start(self) -> None:
        """Open every tracker."""
        self._each("start", lambda tracker: tracker.start())

    def log(self, record: StepMetrics) -> None:
        """Record one optimiser step everywhere."""
        self._each("log", lambda tracker: tracker.log(record))

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Record validation images everywhere."""
        self._each("log images", lambda tracker: tracker.log_images(step, images))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Close every tracker."""
        self._each("finish", lambda tracker: tracker.finish())

    def _each(self, doing: str, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - named boundary: a tracker must never end a run
                self._trackers.remove(tracker)
                logger.warning(
                    "%s failed to %s (%s: %s) and is removed from this run.",
                    type(tracker).__name__,
                    doing,
                    type(error).__name__,
                    error,
                )


def build_trackers(
    config: TrackingConfig, *, output_dir: Path, settings: Mapping[str, object], resumed_step: int
) -> Trackers:
    """The JSONL log and every tracker of `report_to`, not yet started.

    Raises:
        MissingDependencyError: The package of a tracker is not installed.
    """
    trackers: list[Tracker] = [JsonLines(output_dir / METRICS_FILE, resumed_step=resumed_step)]
    for name in config.report_to:
        tracker = TRACKERS[name].load()
        trackers.append(
            tracker(config=config, output_dir=output_dir, settings=settings, resumed_step=resumed_step)
        )
    return Trackers(trackers)

"""Trackers: the local JSONL log, which every run has, and those of report_to."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.io.atomic import write_json, write_text
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.optional import require
from simpletuner.helpers.io.redaction import PLACEHOLDER, redacted, redacted_json
from simpletuner.helpers.io.run_folder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    TRACKIO_FILE,
    WANDB_FILE,
)
from simpletuner.helpers.reporting.evaluations import EvaluationMetrics
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.reporting.tracker_thread import QUIET_S, Tracker, TrackerThread
from simpletuner.helpers.reporting.webhooks import Message, Webhook

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.tracking import TrackingConfig

logger = logging.getLogger(__name__)


class JsonLines:
    """One JSON object per step or evaluation. Rows that cannot be written are kept and written later."""

    def __init__(self, file: Path, *, resumed_step: int) -> None:
        self._file = file
        self._resumed_step = resumed_step
        self._waiting: deque[bytes] = deque()
        self._size: int | None = None
        """Bytes of whole rows in the file; None until the rows of later steps are removed."""
        self._is_torn = False
        """The file may end in a part of a row."""
        self._has_warned = False

    def start(self) -> None:
        """Remove the lines after the step that the run resumes from; all of them if it starts anew."""
        self._write()

    def log(self, record: StepMetrics | EvaluationMetrics) -> None:
        """Append one line and hand it to the operating system."""
        self._waiting.append(f"{json.dumps(asdict(record))}\n".encode())
        self._write()

    def finish(self) -> None:
        """Write the rows that wait, for the last time; warn of those that are lost."""
        self._write()
        if self._waiting:
            logger.warning("%s lacks the last %d rows.", printable(str(self._file)), len(self._waiting))

    def _write(self) -> None:
        try:
            if self._size is None:
                self._size = self._remove_later_steps()
            with self._file.open("ab") as file:
                if self._is_torn:
                    file.truncate(min(self._size, file.tell()))
                self._is_torn = True
                while self._waiting:
                    file.write(self._waiting[0])
                    file.flush()
                    self._size += len(self._waiting.popleft())
            self._is_torn = False
        except (OSError, StorageError) as error:
            if not self._has_warned:
                logger.warning("Rows of the log wait in memory until they can be written: %s", error)
            self._has_warned = True

    def _remove_later_steps(self) -> int:
        """Bytes of the lines that stay."""
        text = self._file.read_text("utf-8", errors="replace") if self._file.exists() else ""
        lines = text.splitlines()
        last = self._resumed_step or -1
        kept = "".join(f"{line}\n" for line in lines if 0 <= _step_of(line) <= last)
        write_text(self._file, kept)
        return len(kept.encode())


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

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Add one point to the curve of each score."""
        for name, value in scores.items():
            self._writer.add_scalar(f"validation/{name}", value, step)

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
        if sys.stdin.isatty():  # it may ask for a key, which it must not do below the progress bar
            with suppress(self._wandb.errors.UsageError):
                self._wandb.login(verify=False)

    def start(self) -> None:
        """Open the run, online or offline by WANDB_MODE."""
        id_file = self._output_dir / WANDB_FILE
        run_id = json.loads(id_file.read_bytes())["id"] if id_file.exists() else None
        project = redacted(self._config.tracker_project_name)
        self._run = self._wandb.init(
            project=PLACEHOLDER.sub(r"{\1}", project),  # it takes no colon
            name=redacted_json(self._config.tracker_run_name),
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(self._output_dir),
            config=self._settings,
            settings=self._wandb.Settings(init_timeout=60, console="off"),
        )
        write_json(id_file, {"id": self._run.id})

    def log(self, record: StepMetrics) -> None:
        """Add one point to each curve."""
        self._run.log(_named("train", record.curves), step=record.step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Upload images at a step."""
        uploads = [self._wandb.Image(str(path), caption=label) for label, path in images.items()]
        self._run.log({"validation": uploads}, step=step)

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Add one point to the curve of each score."""
        self._run.log(_named("validation", scores), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


class Trackio:
    """Trackio; the output folder keeps the run's name, so a resumed run continues it.

    Limit: Trackio finds a run by its name, so of two runs with one tracker_run_name it continues the newer.
    """

    def __init__(
        self, *, config: TrackingConfig, output_dir: Path, settings: Mapping[str, object], **_: object
    ) -> None:
        self._trackio: Any = require("trackio", extra="track")
        self._config = config
        self._name_file = output_dir / TRACKIO_FILE
        self._settings = dict(settings)
        self._run: Any = None

    def start(self) -> None:
        """Open the run, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""
        kept = json.loads(self._name_file.read_bytes())["name"] if self._name_file.exists() else None
        self._run = self._trackio.init(
            project=redacted(self._config.tracker_project_name),
            name=kept or redacted_json(self._config.tracker_run_name),
            resume="allow" if kept else "never",
            config=self._settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        write_json(self._name_file, {"name": self._run.name})

    def log(self, record: StepMetrics) -> None:
        """Add one point to each curve."""
        self._run.log(_named("train", record.curves), step=record.step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Add images at a step."""
        added = {
            f"validation/{label}": self._trackio.Image(path, caption=label) for label, path in images.items()
        }
        self._run.log(added, step=step)

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Add one point to the curve of each score."""
        self._run.log(_named("validation", scores), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


def _named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items()}


class Trackers:
    """All that records a run: the local log, and the trackers of report_to and the webhooks in threads."""

    def __init__(
        self,
        log: JsonLines | None,
        trackers: Sequence[Tracker] = (),
        *,
        evaluations: JsonLines | None = None,
        webhooks: Sequence[Webhook] = (),
        timeout_s: float = 30.0,
    ) -> None:
        self._log = log
        self._evaluations = evaluations
        self._tracker_threads = [TrackerThread(tracker) for tracker in trackers]
        self._webhook_threads = {webhook: TrackerThread(webhook) for webhook in webhooks}
        self._threads = [*self._tracker_threads, *self._webhook_threads.values()]
        self._timeout_s = timeout_s

    def start(self) -> None:
        """Open every tracker."""
        for log in filter(None, (self._log, self._evaluations)):
            log.start()
        for thread in self._threads:
            thread.start()

    def log(self, record: StepMetrics) -> None:
        """Record one optimiser step in the log and the trackers."""
        if self._log is not None:
            self._log.log(record)
        for thread in self._tracker_threads:
            thread.log(record)

    def log_evaluation(self, record: EvaluationMetrics) -> None:
        """Record the losses of held-out images in their log and the trackers."""
        if self._evaluations is not None:
            self._evaluations.log(record)
        self.log_scores(record.step, record.curves)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Give validation images to the trackers; the output folder has them already."""
        for thread in self._threads:
            thread.log_images(step, images)

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Give scores of validation, or of an evaluation, to the trackers; the output folder has them."""
        for thread in self._threads:
            thread.log_scores(step, scores)

    def notify(self, message: Message) -> None:
        """Have every webhook send a message."""
        for webhook, thread in self._webhook_threads.items():
            thread.call(partial(webhook.send, message))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def limit_wait(self, seconds: float) -> None:
        """Have `finish` wait no longer than this."""
        self._timeout_s = min(self._timeout_s, seconds)

    def finish(self) -> None:
        """Close every tracker; those in threads get timeout_s together, then one warning with the losses."""
        for log in filter(None, (self._log, self._evaluations)):
            log.finish()
        for thread in self._threads:
            thread.close()
        deadline_s = time.monotonic() + self._timeout_s
        quiet_s = min(deadline_s, time.monotonic() + QUIET_S)
        slow = [thread.name for thread in self._threads if not thread.wait_until(quiet_s)]
        if slow:
            logger.info("Waiting up to %g s for %s.", self._timeout_s, ", ".join(slow))
        for thread in self._threads:
            thread.wait_until(deadline_s)
            thread.warn_of_losses(timeout_s=self._timeout_s)


def build_trackers(
    config: TrackingConfig,
    *,
    output_dir: Path,
    settings: Mapping[str, object],
    resumed_step: int,
    evaluates: bool = False,
) -> Trackers:
    """The JSONL logs, every tracker of `report_to` and every webhook, not yet started.

    Raises:
        MissingDependencyError: The package of a tracker is not installed.
    """
    trackers: list[Tracker] = []
    for name in config.report_to:
        tracker = TRACKERS[name].load()
        trackers.append(
            tracker(config=config, output_dir=output_dir, settings=settings, resumed_step=resumed_step)
        )
    log = JsonLines(output_dir / METRICS_FILE, resumed_step=resumed_step)
    name = config.tracker_run_name or config.tracker_project_name
    webhooks = [Webhook(each, name=name) for each in config.webhooks]
    file = output_dir / EVALUATIONS_FILE
    keeps_evaluations = evaluates or file.exists()  # an earlier run's are removed
    return Trackers(
        log,
        trackers,
        evaluations=JsonLines(file, resumed_step=resumed_step) if keeps_evaluations else None,
        webhooks=webhooks,
        timeout_s=config.tracker_timeout_seconds,
    )

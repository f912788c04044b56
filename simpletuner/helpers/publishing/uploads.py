"""Uploads of a run in the background: each in a process of its own, which cannot delay or end the run."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Self, TypeVar

from simpletuner.helpers.errors import PublishError, SimpleTunerError
from simpletuner.helpers.io.atomic import link_or_copy
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, checkpoint_folder
from simpletuner.helpers.publishing.run_files import UPLOADED_FILES, waiting_adapters, waiting_folder
from simpletuner.helpers.publishing.state import load_uploaded, note_repository

logger = logging.getLogger(__name__)

FINISH_WAIT_S = 600.0
"""For the upload of a finished run; a stop signal ends the wait."""
MOST_WAITING = 20
"""Adapters of checkpoints that wait for their upload, the newest: each may keep the disk space of a removed
checkpoint."""
QUIET_S = 1.0
"""A wait that is not worth a line."""
LOGIN_WAIT_S = 30.0
END_WAIT_S = 2.0
"""For the thread of an upload whose process was ended."""
OFFLINE = "HF_HUB_OFFLINE is set"
_POLL_S = 0.1

T = TypeVar("T")


def publish_command(output_dir: Path) -> str:
    """The command that uploads what is missing."""
    return f"simpletuner publish {shlex.quote(str(output_dir))}"


def check_login(name: str, *, private: bool, output_dir: Path, wait_s: float = LOGIN_WAIT_S) -> bool:
    """Find or create the repository before a run begins; False with a warning where the hub gives no answer.

    Args:
        name: owner/name, or name.
        private: Create it private, and refuse one that is public.
        output_dir: The output folder, for the message.
        wait_s: Seconds to wait for the hub.

    Raises:
        ConfigError: There is no valid login, it may not write there, or the repository is public.
    """
    from simpletuner.helpers.publishing import hub  # here: its client takes longer to import than all else

    if hub.is_offline():
        reason = OFFLINE
    else:
        found: list[hub.Repository | SimpleTunerError] = []
        open_it = partial(hub.open_repository, name, private=private)
        thread = Thread(target=lambda: found.append(_result(open_it)), name="hub login", daemon=True)
        thread.start()
        thread.join(wait_s)
        answer = found[0] if found else PublishError(f"The hub gave no answer in {wait_s:g} s.")
        if isinstance(answer, hub.Repository):
            note_repository(answer, load_uploaded(output_dir))
            kind = "private" if answer.is_private else "public"
            logger.info("Uploads go to %s (%s).", answer.address, kind)
            return True
        if not isinstance(answer, PublishError):
            raise answer
        reason = str(answer).rstrip(".")
    logger.warning(
        "%s. The run goes on; this uploads its files later: %s", reason, publish_command(output_dir)
    )
    return False


@dataclass(kw_only=True)
class Uploads:
    """Uploads the output folder whenever it is asked to; a context manager around the run.

    One upload runs at a time. What is not uploaded when the run ends is named with the command for it.
    """

    output_dir: Path
    is_enabled: bool
    """push_to_hub, on the main process."""
    with_checkpoints: bool = False
    repository: str | None = None
    public: bool = False
    should_stop: Callable[[], bool] = bool
    """Whether a signal stops the run, which then waits no longer."""
    wait_s: float = FINISH_WAIT_S
    _changed: Condition = field(default_factory=Condition)
    _is_wanted: bool = False
    _is_closing: bool = False
    _is_uploading: bool = False
    _problem: str = ""
    """Why the last upload failed."""
    _process: subprocess.Popen[str] | None = None
    _thread: Thread | None = None
    _last_step: int | None = None

    def __enter__(self) -> Self:
        if self.is_enabled:
            self._thread = Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        try:
            self._wait(0.0 if error is not None else self.wait_s)
        finally:
            self._end()

    def add_checkpoint(self, step: int) -> None:
        """Upload the adapter of a checkpoint, once; the checkpoint may be removed meanwhile."""
        if not self.is_enabled or not self.with_checkpoints or step == self._last_step:
            return
        self._last_step = step
        checkpoint = checkpoint_folder(self.output_dir, step)
        files = [file for name in UPLOADED_FILES if (file := checkpoint / name).exists()]
        try:
            for file in files or [checkpoint / ADAPTER_FILE]:
                link_or_copy(file, waiting_folder(self.output_dir, step) / file.name)
        except SimpleTunerError as error:
            logger.warning("The adapter of step %d is not uploaded: %s", step, error)
            return
        for waiting in self._too_many():
            logger.warning("%s is not uploaded: too many wait for it.", waiting.parent.name)
            shutil.rmtree(waiting.parent, ignore_errors=True)
        self.request()

    def request(self) -> None:
        """Upload what is missing, soon."""
        with self._changed:
            self._is_wanted = self.is_enabled
            self._changed.notify()

    def _too_many(self) -> list[Path]:
        return waiting_adapters(self.output_dir)[:-MOST_WAITING]

    def _wait(self, seconds: float) -> None:
        """Wait until nothing is left to upload, for some seconds or until a signal."""
        deadline_s, quiet_s = time.monotonic() + seconds, time.monotonic() + QUIET_S
        has_said = False
        while self._is_busy() and time.monotonic() < deadline_s and not self.should_stop():
            if not has_said and time.monotonic() > quiet_s:
                has_said = True
                logger.info("Waiting up to %g s for the upload; Ctrl-C leaves it.", seconds)
            time.sleep(_POLL_S)

    def _end(self) -> None:
        """End the thread and an upload that still runs, and say what is left."""
        with self._changed:
            is_left, self._is_closing = self._is_busy(), True
            self._changed.notify()
        if (process := self._process) is not None:
            process.kill()  # what it left unfinished is in no file that anybody reads
        if self._thread is not None:
            self._thread.join(END_WAIT_S)
        if is_left:
            self._problem = "it had not ended with the run"
        if self._problem:
            logger.warning(
                "The upload is not complete: %s. This uploads what is missing: %s",
                self._problem.rstrip("."),
                publish_command(self.output_dir),
            )

    def _is_busy(self) -> bool:
        return self._is_wanted or self._is_uploading

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_wanted or self._is_closing)
                if self._is_closing:
                    return
                self._is_wanted, self._is_uploading = False, True
            self._upload()
            with self._changed:
                self._is_uploading = False

    def _upload(self) -> None:
        from simpletuner.helpers.publishing import hub

        if hub.is_offline():
            self._problem = OFFLINE
            return
        command = [sys.executable, "-m", "simpletuner", "publish", str(self.output_dir)]
        if self.repository is not None:
            command += ["--repo", self.repository]
        command += ["--public"] if self.public else []
        try:
            # A session of its own: Ctrl-C in the terminal stops the run, which then ends the upload.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self._problem = f"its process does not start: {error.strerror}"
            return
        self._process = process
        if self._is_closing:  # since before there was a process to end
            process.kill()
        output, errors = process.communicate()
        self._process = None
        if self._is_closing:
            return
        if process.returncode == 0:
            self._problem = ""
            logger.info("%s", _last_line(output))
        else:
            self._problem = _last_line(errors).removeprefix("simpletuner: ") or f"code {process.returncode}"
            logger.warning("%s", self._problem)


def _result(action: Callable[[], T]) -> T | SimpleTunerError:
    try:
        return action()
    except SimpleTunerError as error:
        return error


def _last_line(text: str) -> str:
    return next(reversed([line for line in text.splitlines() if line.strip()]), "")

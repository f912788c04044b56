"""Requests to a run that is going on: files in its output folder, answered at its next optimiser step."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.faults import StorageError, storage_error
from simpletuner.helpers.io.lock import is_held
from simpletuner.helpers.io.logs import log_once
from simpletuner.helpers.io.names import counted, printable
from simpletuner.helpers.io.redaction import redacted_json
from simpletuner.helpers.io.run_folder import REQUESTS_FOLDER, answer_file, is_request_file, new_request_file

logger = logging.getLogger(__name__)

Request = Literal["sample", "save", "stop"]
REQUESTS: tuple[Request, ...] = get_args(Request)
SECONDS_BETWEEN_LOOKS = 1.0
MAX_BYTES = 4096
"""Of a request's file; a longer one is not read."""
POLL_S = 0.1
QUIET_S = 2.0
"""The wait for an answer that is not worth a line."""


class RequestError(SimpleTunerError):
    """A request was not fulfilled."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run says to a request, in a sentence."""

    text: str
    is_done: bool = True


@dataclass(kw_only=True, slots=True)
class RunRequests:
    """The requests to a run, on its main process; a request that cannot be read or removed never ends it."""

    output_dir: Path
    is_enabled: bool = True
    """On the main process."""
    _next_look_s: float = 0.0
    _waiting: dict[Path, Request] = field(default_factory=dict)
    _kept: set[str] = field(default_factory=set)
    """Names of answered requests that could not be removed."""

    def wanted(self) -> frozenset[Request]:
        """What is asked for; it looks at the folder at most once a second, and finds nothing in between."""
        now_s = time.monotonic()
        if not self.is_enabled or now_s < self._next_look_s:
            return frozenset()
        self._next_look_s = now_s + SECONDS_BETWEEN_LOOKS
        for file in _request_files(self.output_dir):
            if file.name not in self._kept and (request := self._read(file)) is not None:
                self._waiting[file] = request
        return frozenset(self._waiting.values())

    def answer(self, answers: Mapping[Request, Answer]) -> None:
        """Answer the requests that `wanted` found, and remove them."""
        for file, request in self._waiting.items():
            logger.info("Asked to %s: %s", request, answers[request].text)
            self._finish(file, answers[request])
        self._waiting.clear()

    def _read(self, file: Path) -> Request | None:
        """What a file asks for; one that is no request of this version is refused and removed."""
        content = _content(file)
        if content is None:
            return None
        request = content.get("request")
        for known in REQUESTS:
            if request == known:
                return known
        text = f"{printable(file.name)} is no request that this run knows. It knows {', '.join(REQUESTS)}."
        logger.warning("%s", text)
        self._finish(file, Answer(text, is_done=False))
        return None

    def _finish(self, file: Path, answer: Answer) -> None:
        try:
            content = _content(file) or {}
            if content.get("waits") is True:  # else nobody would remove the answer
                write_json(answer_file(file), redacted_json(asdict(answer)))
            file.unlink(missing_ok=True)
        except (OSError, StorageError) as error:
            self._kept.add(file.name)
            logger.warning(
                "The request %s was answered and cannot be removed: %s", printable(file.name), error
            )


def remove_requests(output_dir: Path) -> None:
    """Remove what an earlier run of this folder left there. The caller holds the run lock.

    Raises:
        StorageError: They cannot be removed.
    """
    requests = _request_files(output_dir)
    try:
        for file in (output_dir / REQUESTS_FOLDER).glob("*.json"):  # answers that nobody waited for too
            if not file.is_dir():
                file.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(output_dir / REQUESTS_FOLDER, error) from error
    if requests:
        logger.info(
            "Removed %s to an earlier run, which ended before it answered: %s.",
            counted(len(requests), "request"),
            ", ".join(sorted(printable(file.name) for file in requests)),
        )


def ask(
    output_dir: Path, request: Request, *, is_waiting: bool = True, say: Callable[[str], None] = logger.info
) -> str:
    """Ask the run of this folder for something, and return its answer; without waiting, what to expect.

    The request is withdrawn when the wait is interrupted.

    Raises:
        RequestError: The run refused, failed, or ended before it answered.
        StorageError: The folder cannot be written.
    """
    file = new_request_file(output_dir, request)
    write_json(file, {"request": request, "waits": is_waiting})
    if not is_waiting:
        return f"Asked to {request}. The run answers at its next optimiser step, in its log."
    try:
        answer = _await_answer(file, output_dir, say=say)
    finally:
        for each in (file, answer_file(file)):
            each.unlink(missing_ok=True)
    if not answer.is_done:
        raise RequestError(answer.text)
    return answer.text


def _await_answer(file: Path, output_dir: Path, *, say: Callable[[str], None]) -> Answer:
    begun_s, has_said, where = time.monotonic(), False, printable(str(output_dir))
    while True:
        # Both are asked before the answer is looked for: a run may answer as it ends.
        was_there, was_running = file.exists(), is_held(output_dir)
        answer = _answer(file)
        if answer is not None:
            return answer
        if not was_running:
            return Answer(
                f"{where}: the run ended before it answered. `simpletuner runs` shows its state.",
                is_done=False,
            )
        if not was_there:
            return Answer(f"{where}: the request was removed before an answer. Ask again.", is_done=False)
        if not has_said and time.monotonic() - begun_s > QUIET_S:
            has_said = True
            say("Waiting for the run's next optimiser step. Ctrl-C withdraws the request.")
        time.sleep(POLL_S)


def _answer(request: Path) -> Answer | None:
    try:
        return Answer(**json.loads(answer_file(request).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):  # of another version, or changed by another hand
        return Answer("The run answered, and its answer cannot be read. Its log has it too.", is_done=False)


def _request_files(output_dir: Path) -> list[Path]:
    folder = output_dir / REQUESTS_FOLDER
    try:
        with os.scandir(folder) as entries:
            return [
                Path(each)
                for each in entries
                if is_request_file(each.name) and not each.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        log_once(
            logger.warning,
            f"Requests to this run cannot be read: {printable(str(folder))}: {error.strerror}.",
        )
        return []


def _content(file: Path) -> dict[str, Any] | None:
    """The content of a request; empty if it is unreadable, None if it was withdrawn."""
    try:
        # A pipe, for instance, would be waited for.
        readable = stat.S_ISREG((status := file.stat()).st_mode) and status.st_size <= MAX_BYTES
        content = json.loads(file.read_bytes()) if readable else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

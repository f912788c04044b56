"""Ending a run early without losing work: SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

from simpletuner.helpers.errors import SimpleTunerError

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C reaches a run twice, from the terminal and from the launcher that passes it on.
SAME_REQUEST_S = 0.5


class Preempted(SimpleTunerError):
    """The run was asked to stop and can be resumed by starting it again."""

    exit_code = EXIT_PREEMPTED


class Preemption:
    """Notes the first request to stop; a second one ends the process at once.

    A context manager: signals are watched inside it, and the previous handlers return after it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at_s = 0.0
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        self._previous.clear()

    def check(self, doing: str) -> None:
        """Stop here if a signal came.

        Raises:
            Preempted: A signal came; `doing` says what is left for the next start.
        """
        if self.requested:
            raise Preempted(f"Stopped by a signal while {doing}. The same command goes on from there.")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at_s = True, now_s
            name = signal.Signals(number).name
            logger.warning("%s: stopping after this optimiser step. A second signal stops at once.", name)
        elif now_s - self._requested_at_s > SAME_REQUEST_S:
            os._exit(128 + number)

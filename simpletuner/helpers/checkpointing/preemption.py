"""Stop signals: SIGTERM, SIGUSR1 and SIGINT end a run after a checkpoint."""

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
# One Ctrl-C reaches a run twice, from the terminal and from the launcher that forwards it.
SAME_REQUEST_S = 0.5


class Preempted(SimpleTunerError):
    """A signal stopped the run; the same command resumes it."""

    exit_code = EXIT_PREEMPTED


class Preemption:
    """Records the first stop signal; a second one ends the process at once.

    A context manager: it installs the signal handlers, and restores the previous ones on exit.
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
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # returned by signal.signal
        self._previous.clear()

    def check(self, doing: str) -> None:
        """Raise if a stop signal arrived.

        Raises:
            Preempted: A stop signal arrived; `doing` names the interrupted work.
        """
        if self.requested:
            raise Preempted(f"Stopped by a signal while {doing}. The same command resumes the run.")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at_s = True, now_s
            name = signal.Signals(number).name
            logger.warning("%s: stopping after this optimiser step. A second signal stops at once.", name)
        elif now_s - self._requested_at_s > SAME_REQUEST_S:
            os._exit(128 + number)

"""Stop signals: SIGTERM, SIGUSR1, SIGINT and SIGHUP end a run after a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from simpletuner.helpers.errors import SimpleTunerError

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
"""Those that this system has."""
# One Ctrl-C reaches a run twice, from the terminal and from the launcher that forwards it.
SAME_REQUEST_S = 0.5
LAUNCH_DIR = "SIMPLETUNER_LAUNCH_DIR"
"""Environment variable with the launch folder, where train.sh reads process ids and the exit code."""
STOP_WANTED = "signalled"
"""File in the launch folder: train.sh received a stop signal, or the run was asked to stop."""


def launch_folder() -> Path | None:
    """The folder of a launch of several processes by train.sh; None without."""
    folder = os.environ.get(LAUNCH_DIR)
    return None if folder is None else Path(folder)


def mark_stop_wanted() -> None:
    """Tell the launch that its processes stop because somebody wants it, not because one of them failed."""
    folder = launch_folder()
    if folder is not None:
        with suppress(OSError):  # it is gone when train.sh was killed
            (folder / STOP_WANTED).touch()


def stop_signals() -> list[signal.Signals]:
    """The signals that stop this process: SIGHUP does not under nohup, which ignores it for all it starts."""
    return [
        number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    ]


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
        for number in stop_signals():
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
        now_s, name = time.monotonic(), signal.Signals(number).name
        if not self.requested:
            self.requested, self._requested_at_s = True, now_s
            logger.warning("%s: stopping after this optimiser step. A second signal stops at once.", name)
        # A terminal that closes sends SIGHUP, and so does the shell in it.
        elif name != "SIGHUP" and now_s - self._requested_at_s > SAME_REQUEST_S:
            with suppress(OSError):
                os.write(2, b"Stopped at once. The same command goes on from the last checkpoint.\n")
            os._exit(128 + number)

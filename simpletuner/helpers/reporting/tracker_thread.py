"""Calls a tracker in a thread of its own: one that hangs, fails or exits never delays or ends the run."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Literal, Protocol

from simpletuner.helpers.reporting.metrics import StepMetrics

logger = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Calls of one tracker."""
QUIET_S = 1.0
"""The wait for trackers at the end of a run that is not worth a line."""


class Tracker(Protocol):
    """Records a run."""

    def start(self) -> None:
        """Open the tracker, once, before the first log."""

    def log(self, record: StepMetrics) -> None:
        """Record one optimiser step."""

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Record validation images: label -> file."""

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of validation images, or the losses of held-out ones: name -> value."""

    def finish(self) -> None:
        """Close the tracker."""


@dataclass(frozen=True, slots=True)
class _Call:
    kind: Literal["row", "validation", "message"]
    run: Callable[[], None]


class TrackerThread:
    """The calls of one tracker, in order, in a daemon thread.

    When MAX_WAITING calls wait, the oldest validation is dropped, or the oldest row if none waits. A tracker
    that raises, SystemExit included, gets no further call.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.name = type(tracker).__name__
        self._tracker = tracker
        self._waiting: deque[_Call] = deque()
        self._changed = Condition()
        self._is_closing = self._has_failed = False
        self._given: Counter[str] = Counter()
        self._recorded: Counter[str] = Counter()
        self._thread = Thread(target=self._work, name=f"tracker {self.name}", daemon=True)

    def start(self) -> None:
        """Start the thread, which opens the tracker first."""
        self._thread.start()

    def log(self, record: StepMetrics) -> None:
        """Record one optimiser step, soon."""
        self._put(_Call("row", partial(self._tracker.log, record)))

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Record validation images, soon."""
        self._put(_Call("validation", partial(self._tracker.log_images, step, images)))

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of validation images, soon."""
        self._put(_Call("row", partial(self._tracker.log_scores, step, scores)))

    def call(self, function: Callable[[], None]) -> None:
        """Have the thread call a function of the tracker, after the calls that wait."""
        self._put(_Call("message", function))

    def close(self) -> None:
        """Have the thread close the tracker after the calls that wait."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def wait_until(self, deadline_s: float) -> bool:
        """Wait for the end of the thread until this time.monotonic(); whether it has ended."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        return not self._thread.is_alive()

    def warn_of_losses(self, *, timeout_s: float) -> None:
        """After the last wait: warn once, with the number of calls that the tracker did not record."""
        with self._changed:
            lost, is_hanging = self._given - self._recorded, self._thread.is_alive()
            if self._has_failed or not (lost or is_hanging):
                return
            self._has_failed = True  # a later error of the abandoned thread is no news
        logger.warning(
            "%s was too slow%s: %d rows, %d validations and %d messages are not recorded there. %s",
            self.name,
            f" and had not ended {timeout_s:g} s after the run" if is_hanging else "",
            lost["row"],
            lost["validation"],
            lost["message"],
            "They are in the output folder, in metrics.jsonl and validation/.",
        )

    def _put(self, call: _Call) -> None:
        with self._changed:
            if self._has_failed:
                return
            self._given[call.kind] += 1
            self._waiting.append(call)
            if len(self._waiting) > MAX_WAITING:
                kinds = [each.kind for each in self._waiting]
                del self._waiting[kinds.index("validation") if "validation" in kinds else 0]
            self._changed.notify()

    def _next(self) -> _Call | None:
        """The next call; None once the tracker is closing and none waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return self._waiting.popleft() if self._waiting else None

    def _work(self) -> None:
        doing = "start"
        try:
            self._tracker.start()
            while (call := self._next()) is not None:
                doing = f"log a {call.kind}"
                call.run()
                self._recorded[call.kind] += 1
            doing = "finish"
            self._tracker.finish()
        except BaseException as error:  # noqa: BLE001 - named boundary: a tracker must never end a run
            self._fail(doing, error)

    def _fail(self, doing: str, error: BaseException) -> None:
        with self._changed:
            is_first, self._has_failed = not self._has_failed, True
        if is_first:
            logger.warning(
                "%s failed to %s (%s: %s) and is removed from this run.",
                self.name,
                doing,
                type(error).__name__,
                error,
            )

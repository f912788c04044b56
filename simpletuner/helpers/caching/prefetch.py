"""Computes the next result in a thread while the current one is used, and watches the wait for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from simpletuner.helpers.errors import LoaderTimeoutError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_NOTICE_S = 30.0
NOTICE_INTERVAL_S = 60.0
POLL_S = 0.2
CLOSE_S = 1.0
"""The wait for the thread when no further result is needed; one that hangs is left behind."""


def _never_stop(_doing: str) -> None:
    """No signal ends the wait."""


@dataclass(slots=True)
class LoaderWatch:
    """How long a run waits for its loader, what is said meanwhile, and what ends the wait."""

    timeout_s: float = 0.0
    """0 waits for ever."""
    check: Callable[[str], None] = _never_stop
    """Raises if a stop signal arrived; it gets what the signal interrupts."""
    stop_after_s: float = 2.0
    """A signal ends waits that are longer. Otherwise the optimiser step goes on to its end."""
    _reading: str = "the first item"

    def note(self, reading: str) -> None:
        """Note what the loader reads now, for messages."""
        self._reading = reading

    def wait_for(self, result: Future[Result]) -> Result:
        """Wait for a result of the loader.

        Raises:
            LoaderTimeoutError: It took longer than timeout_s.
            Preempted: A stop signal arrived.
        """
        started_s, notice_s = time.monotonic(), FIRST_NOTICE_S
        while not wait([result], POLL_S).done:
            waited_s = time.monotonic() - started_s
            if waited_s >= self.stop_after_s:
                self.check(f"the loader was reading {self._reading}")
            if 0 < self.timeout_s <= waited_s:
                raise LoaderTimeoutError(
                    f"The loader has been reading {self._reading} for {waited_s:.0f} s "
                    f"(loader_timeout_seconds: {self.timeout_s:g}). Check that disk or network folder, then "
                    "start the run again; raise loader_timeout_seconds if it is only slow, 0 waits for ever."
                )
            if waited_s >= notice_s:
                notice_s += NOTICE_INTERVAL_S
                # An error, because only the first process shows warnings.
                logger.error("The loader has been reading %s for %.0f s.", self._reading, waited_s)
        return result.result()


def prefetch(
    items: Iterable[Item], work: Callable[[Item], Result], *, watch: LoaderWatch | None = None
) -> Iterator[Result]:
    """Yield work(item) for each item in order; a thread works one item ahead.

    An exception in `work` is raised where its result would have been yielded. The thread is a daemon: one
    that hangs keeps no process alive.

    Raises:
        LoaderTimeoutError: A result took longer than the watch allows.
        Preempted: A stop signal arrived while it was waited for.
    """
    watch = watch or LoaderWatch()
    remaining = iter(items)
    jobs: SimpleQueue[tuple[Item, Future[Result]] | None] = SimpleQueue()
    thread = Thread(target=_serve, args=(jobs, work), name="prefetch", daemon=True)
    thread.start()
    try:
        upcoming = _submit(remaining, jobs)
        while upcoming:
            result = watch.wait_for(upcoming.pop())
            upcoming = _submit(remaining, jobs)
            yield result
    finally:
        jobs.put(None)
        thread.join(CLOSE_S)


def _submit(
    items: Iterator[Item], jobs: SimpleQueue[tuple[Item, Future[Result]] | None]
) -> list[Future[Result]]:
    """Give the thread the next item, if there is one; its future result."""
    results: list[Future[Result]] = []
    for item in islice(items, 1):
        results.append(Future())
        jobs.put((item, results[0]))
    return results


def _serve(jobs: SimpleQueue[tuple[Item, Future[Result]] | None], work: Callable[[Item], Result]) -> None:
    while (job := jobs.get()) is not None:
        item, result = job
        try:
            result.set_result(work(item))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is used
            result.set_exception(error)

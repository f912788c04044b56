"""Computes the next result in a thread while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield work(item) for each item in order; a thread works one item ahead.

    An exception in `work` is raised where its result would have been yielded.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        upcoming = [thread.submit(work, item) for item in islice(remaining, 1)]
        while upcoming:
            result = upcoming.pop().result()
            upcoming = [thread.submit(work, item) for item in islice(remaining, 1)]
            yield result

"""Work done one item ahead of its use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield work(item) in order, while a thread already does the next one.

    An exception of the work is raised where its result would have been yielded.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        upcoming = [thread.submit(work, item) for item in _first(remaining)]
        while upcoming:
            result = upcoming.pop().result()
            upcoming = [thread.submit(work, item) for item in _first(remaining)]
            yield result


def _first(remaining: Iterator[Item]) -> Iterator[Item]:
    """The next item, or nothing."""
    for item in remaining:
        yield item
        return

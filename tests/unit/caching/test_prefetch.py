"""The next result is computed in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace

import pytest

from simpletuner.helpers.caching import prefetch as module
from simpletuner.helpers.caching.prefetch import LoaderWatch, prefetch
from simpletuner.helpers.checkpointing.preemption import Preempted
from simpletuner.helpers.errors import LoaderTimeoutError


def test_prefetch_gives_every_result_in_order() -> None:
    assert list(prefetch(range(5), lambda number: number * 2)) == [0, 2, 4, 6, 8]


def test_prefetch_of_nothing_is_nothing() -> None:
    assert list(prefetch([], str)) == []


def test_prefetch_works_one_item_ahead_and_no_more() -> None:
    begun: list[int] = []
    results = prefetch(count(), begun.append)
    next(results)
    results.close()
    assert begun == [0, 1]


def test_prefetch_raises_where_the_result_would_have_been() -> None:
    results = prefetch([1, 0], lambda number: 1 // number)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Work that never ends, while the clock makes ten seconds at each look."""
    released = threading.Event()
    clock = count(0.0, 10.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(module, "POLL_S", 0.001)
    monkeypatch.setattr(module, "CLOSE_S", 0.01)
    yield lambda _: released.wait() and None
    released.set()


@pytest.mark.reliability_row(31)
def test_loader_that_hangs_is_named_at_30_s_and_each_minute_and_ends_the_run_at_its_limit(
    hang: Callable[[object], None], caplog: pytest.LogCaptureFixture
) -> None:
    watch = LoaderWatch(timeout_s=300.0)
    watch.note("image0.png")
    with caplog.at_level(logging.ERROR), pytest.raises(LoaderTimeoutError) as info:
        next(prefetch([0], hang, watch=watch))
    said = [record.getMessage() for record in caplog.records]
    assert [f"{seconds} s" in line for seconds, line in zip((30, 90, 150, 210, 270), said, strict=True)]
    assert all("image0.png" in line for line in [*said, str(info.value)])
    assert "loader_timeout_seconds: 300" in str(info.value)
    assert info.value.exit_code == 1


@pytest.mark.reliability_row(31)
def test_loader_that_is_slow_is_waited_for_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, released = count(0.0, 10.0), threading.Event()

    def monotonic() -> float:
        now_s = next(clock)
        if now_s > 5000:
            released.set()
        return now_s

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(module, "POLL_S", 0.0001)
    assert list(prefetch([7], lambda item: (released.wait(), item)[1], watch=LoaderWatch())) == [7]


@pytest.mark.reliability_row(31)
def test_signal_ends_the_wait_for_a_loader_that_hangs(hang: Callable[[object], None]) -> None:
    checked: list[str] = []

    def check(doing: str) -> None:
        checked.append(doing)
        if len(checked) == 3:
            raise Preempted(doing)

    watch = LoaderWatch(timeout_s=1000.0, check=check, stop_after_s=25.0)
    watch.note("image0.png")
    with pytest.raises(Preempted, match=r"image0\.png"):
        next(prefetch([0], hang, watch=watch))
    assert len(checked) == 3


def test_loader_that_hangs_keeps_no_process_alive(hang: Callable[[object], None]) -> None:
    results = prefetch([0], hang, watch=LoaderWatch(timeout_s=1.0))
    with pytest.raises(LoaderTimeoutError):
        next(results)
    (thread,) = [each for each in threading.enumerate() if each.name == "prefetch"]
    assert thread.daemon

"""The next result is computed in a thread."""

from __future__ import annotations

from itertools import count

import pytest

from simpletuner.helpers.caching.prefetch import prefetch


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

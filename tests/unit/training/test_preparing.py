"""Processes of one machine share the first scan of the data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.training.preparing import first_process_first


@pytest.mark.parametrize(
    ("is_first", "expected"),
    [(True, ["scan", "barrier"]), (False, ["barrier", "scan"])],
    ids=["first", "other"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_others_scan_once_the_first_is_done_or_failed(
    is_first: bool, fails: bool, expected: list[str]
) -> None:
    events: list[str] = []

    def scan() -> None:
        events.append("scan")
        if fails:
            raise DataError("no image can be used")

    accelerator = SimpleNamespace(
        is_local_main_process=is_first, wait_for_everyone=lambda: events.append("barrier")
    )
    try:
        with first_process_first(accelerator):
            scan()
    except DataError:
        assert fails
    assert events == expected

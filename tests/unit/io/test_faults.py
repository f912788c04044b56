"""Crash points and the errors of failed reads and writes."""

from __future__ import annotations

import errno
from pathlib import Path

from simpletuner.helpers.io.faults import at_crash_points, crash_point, storage_error


def test_crash_point_calls_every_action_and_none_after_its_context() -> None:
    passed: list[str] = []
    with at_crash_points(passed.append), at_crash_points(passed.append):
        crash_point("here")
    crash_point("there")
    assert passed == ["here", "here"]


def test_storage_error_measures_free_space_where_the_path_will_be(tmp_path: Path) -> None:
    error = storage_error(tmp_path / "not" / "there", OSError(errno.ENOSPC, "full"), needed=10)
    assert "10 bytes needed" in str(error)


def test_storage_error_shows_a_hostile_name_on_one_line(tmp_path: Path) -> None:
    assert "\n" not in str(storage_error(tmp_path / "two\nlines", OSError(errno.EIO, "broken")))

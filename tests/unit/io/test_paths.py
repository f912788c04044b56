"""Paths with the separators of another system."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.io.paths import has_drive, portable


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_backslash_separates_folders_unless_the_literal_name_exists() -> None:
    Path("images/cats").mkdir(parents=True)
    assert portable(Path("images\\cats")) == Path("images/cats")
    Path("images\\cats").mkdir()
    assert portable(Path("images\\cats")) == Path("images\\cats")
    assert portable(Path("images\\cats/new")) == Path("images\\cats/new")
    assert portable(Path("new\\cats/a")) == Path("new/cats/a")


@pytest.mark.parametrize("text", ["images/cats", "none", "/a/b", "\\", "\\images", "C:\\images"])
def test_a_path_without_a_backslash_or_of_a_drive_stays(text: str) -> None:
    assert portable(Path(text)) == Path(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C:\\a", True),
        ("d:/a", True),
        ("\\\\server\\a", True),
        ("\\a", True),
        ("C:a", False),
        ("a/C:\\", False),
        ("", False),
    ],
)
def test_a_drive_or_a_server_is_of_windows(text: str, expected: bool) -> None:
    assert has_drive(text) is expected

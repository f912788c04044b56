"""Names that are safe to print and safe as file names."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.helpers.io.names import counted, file_name, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat.png", "cat.png"),
        ("two\nlines", r"two\nlines"),
        ("🐈 e\u0301", "🐈 e\u0301"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("\x1b[31m", r"\x1b[31m"),
    ],
)
@pytest.mark.reliability_row(20)
def test_printable_shows_a_name_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a photo of a cat", "a_photo_of_a_cat"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\windows", "C_windows"),
        ("-rf", "rf"),
        ("...", "unnamed"),
        ("", "unnamed"),
    ],
)
@pytest.mark.reliability_row(21)
def test_file_name_stays_in_its_folder(text: str, name: str) -> None:
    assert file_name(text) == name


@given(st.text(st.characters(), max_size=300))
@pytest.mark.reliability_row(21)
def test_file_name_is_one_short_visible_component_for_any_text(text: str) -> None:
    name = file_name(text)
    assert 0 < len(name.encode()) <= 120
    assert "/" not in name
    assert "\0" not in name
    assert not name.startswith((".", "-"))


@pytest.mark.parametrize(
    ("number", "noun", "plural", "text"),
    [
        (1, "image", None, "1 image"),
        (0, "image", None, "0 images"),
        (12000, "step", None, "12,000 steps"),
        (1, "batch", "batches", "1 batch"),
        (2, "batch", "batches", "2 batches"),
    ],
)
def test_counted_agrees_with_the_number(number: int, noun: str, plural: str | None, text: str) -> None:
    assert counted(number, noun, plural) == text

"""Captions out of text files and names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.helpers.data.captions import (
    MAX_CAPTION_CHARACTERS,
    CaptionReader,
    Captions,
    TextFileCaptions,
    caption_from_name,
    captions_from_file,
    with_instance_prompt,
)
from simpletuner.helpers.data.sources import FoundFile, scan_folder
from simpletuner.helpers.errors import DataError


def text_file(folder: Path, data: bytes) -> FoundFile:
    (folder / "a.txt").write_bytes(data)
    return scan_folder(folder).captions["a"][0]


@pytest.mark.parametrize(
    ("data", "texts", "note"),
    [
        (b"a cat", ("a cat",), None),
        (b"a cat\n", ("a cat",), None),
        (b"\xef\xbb\xbfa cat", ("a cat",), None),
        (b"a cat\r\n", ("a cat",), None),
        (b"a cat\r\n\r\na dog\r\na cat", ("a cat", "a dog"), None),
        ("ein Kätzchen 🐈".encode(), ("ein Kätzchen 🐈",), None),
        (b"", ("",), "empty"),
        (b" \n\t\r\n", ("",), "empty"),
        (b"\xef\xbb\xbf", ("",), "empty"),
    ],
)
@pytest.mark.reliability_row(15)
def test_a_text_file_gives_one_caption_a_line(
    tmp_path: Path, data: bytes, texts: tuple[str, ...], note: str | None
) -> None:
    assert captions_from_file(text_file(tmp_path, data)) == Captions(texts=texts, note=note)


@pytest.mark.reliability_row(15)
def test_a_missing_text_file_is_noted() -> None:
    assert captions_from_file(None) == Captions(texts=("",), note="missing")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Kätzchen".encode("latin-1"), "not UTF-8 .byte 0xe4 at position 1."),
        ("a cat".encode("utf-16"), "not UTF-8"),
        ("a cat".encode("utf-16-le"), "NUL at position 1"),
        (b"a\0cat", "NUL at position 1"),
        (b"x" * (1 << 20) + b"x", "over 1048576 bytes"),
    ],
    ids=["latin-1", "utf-16", "utf-16 without mark", "nul", "huge"],
)
@pytest.mark.reliability_row(15)
def test_a_text_file_that_is_not_utf8_text_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        captions_from_file(text_file(tmp_path, data))


@pytest.mark.parametrize("word", ["cat ", "cat"], ids=["words", "one word"])
@pytest.mark.reliability_row(15)
def test_a_caption_of_100_kb_is_cut_at_a_word_and_noted(tmp_path: Path, word: str) -> None:
    captions = captions_from_file(text_file(tmp_path, word.encode() * 25_000))
    assert captions.note == "shortened"
    assert MAX_CAPTION_CHARACTERS - 4 <= len(captions.texts[0]) <= MAX_CAPTION_CHARACTERS
    assert captions.texts[0].endswith("cat") or word == "cat"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a_photo_of_a cat.png", "a photo of a cat"),
        ("sub/dir/cat.v2.jpg", "cat.v2"),
        ("🐈.jpg", "🐈"),
        ("___.png", ""),
    ],
)
def test_caption_from_name_reads_underscores_as_spaces(name: str, text: str) -> None:
    assert caption_from_name(name).texts == (text,)


@pytest.mark.reliability_row(20)
def test_a_name_that_is_not_utf8_is_no_caption() -> None:
    with pytest.raises(DataError, match="not UTF-8; rename it"):
        caption_from_name(os.fsdecode(b"\xff.jpg"))


def test_with_instance_prompt_puts_it_before_every_caption() -> None:
    captions = with_instance_prompt(Captions(texts=("a cat", "")), "photo of sks")
    assert captions.texts == ("photo of sks a cat", "photo of sks")


def text_files(folder: Path) -> CaptionReader:
    return TextFileCaptions(scan_folder(folder), suffix=".txt", instance_prompt="")


@pytest.mark.reliability_row(16)
def test_two_images_that_could_claim_one_text_file_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.txt", "b.jpg", "b.png", "c.jpg"):
        (tmp_path / name).write_bytes(b"a cat")
    (conflict,) = text_files(tmp_path).conflicts()
    assert all(name in conflict for name in ("a.txt", "a.jpg", "a.png"))


@pytest.mark.reliability_row(16)
def test_two_text_files_for_one_image_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.png", "a.TXT", "a.txt"):
        (tmp_path / name).write_bytes(b"one")
    reader = text_files(tmp_path)
    with pytest.raises(DataError, match=r"a\.TXT and a\.txt"):
        reader.read(reader.scan.images[0])

"""Captions out of text files and names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.configuration.schema.datasets import CaptionLines, DatasetConfig
from simpletuner.helpers.data.captions import (
    MAX_CAPTION_CHARACTERS,
    CaptionReader,
    Captions,
    TextFileCaptions,
    caption_from_name,
    caption_reader,
    captions_in_text,
    strategy_of,
    text_in,
    with_instance_prompt,
)
from simpletuner.helpers.data.sources.base import FoundFile, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import DataError


def text_file(folder: Path, data: bytes) -> FoundFile:
    (folder / "a.txt").write_bytes(data)
    return scan_source(LocalFolder(folder)).captions["a"][0]


def captions_from_file(file: FoundFile, *, lines: CaptionLines = "choose") -> Captions:
    return captions_in_text(text_in(file), lines)


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


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\r"], ids=ascii)
@pytest.mark.reliability_row(15)
def test_only_a_line_feed_ends_a_line(tmp_path: Path, end: str) -> None:
    text = f"a cat{end}on a mat"
    assert captions_from_file(text_file(tmp_path, f"{text}\r\na dog".encode())).texts == (text, "a dog")


@pytest.mark.parametrize("data", [b"a cat\non a mat", b"a cat\r\non a mat\r\n", b"\n\na cat\non a mat\n\n"])
def test_a_whole_text_is_one_caption(tmp_path: Path, data: bytes) -> None:
    assert captions_from_file(text_file(tmp_path, data), lines="whole").texts == ("a cat\non a mat",)


@pytest.mark.parametrize("data", [b"a cat\na dog", b"\r\n \na cat\r\na dog\na cat"])
def test_the_first_line_with_a_word_is_the_caption(tmp_path: Path, data: bytes) -> None:
    assert captions_from_file(text_file(tmp_path, data), lines="first").texts == ("a cat",)


@pytest.mark.parametrize("lines", ["choose", "first", "whole"])
@pytest.mark.parametrize(
    "text",
    ['{\n  "caption": "a cat"\n}', '[\n"a cat",\n"a dog"\n]', "{\n}", '{\n"seed": ' + "1" * 5000 + "\n}"],
    ids=["object", "array", "empty", "long number"],
)
def test_a_json_text_is_always_one_caption(tmp_path: Path, text: str, lines: CaptionLines) -> None:
    data = f"\ufeff{text}\n".encode()
    assert captions_from_file(text_file(tmp_path, data), lines=lines).texts == (text,)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('{"a": 1}\n{"a": 2}', ('{"a": 1}', '{"a": 2}')),
        ("[sks] cat\n[sks] dog", ("[sks] cat", "[sks] dog")),
        ("{broken\na dog", ("{broken", "a dog")),
        ('"a cat"\n"a dog"', ('"a cat"', '"a dog"')),
        ("[\n" * 5000, ("[",)),
    ],
    ids=["json lines", "tags", "broken", "texts", "too deep"],
)
def test_a_text_that_is_no_json_object_or_array_has_a_caption_a_line(
    tmp_path: Path, text: str, texts: tuple[str, ...]
) -> None:
    assert captions_from_file(text_file(tmp_path, text.encode())).texts == texts


@pytest.mark.reliability_row(15)
def test_a_missing_text_file_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    scan = scan_source(LocalFolder(tmp_path))
    reader = TextFileCaptions(scan, suffix=".txt", instance_prompt="")
    assert reader.read(scan.images[0]) == Captions(texts=("",), note="missing")


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


@pytest.mark.reliability_row(15)
def test_only_the_long_lines_of_a_text_are_cut(tmp_path: Path) -> None:
    captions = captions_from_file(text_file(tmp_path, b"a dog\n" + b"cat " * 25_000))
    assert captions.note == "shortened"
    assert captions.texts[0] == "a dog"
    assert 0 < len(captions.texts[1]) <= MAX_CAPTION_CHARACTERS


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


def text_files(folder: Path, **options: Any) -> CaptionReader:
    return TextFileCaptions(scan_source(LocalFolder(folder)), suffix=".txt", instance_prompt="", **options)


@pytest.mark.reliability_row(16)
def test_two_images_that_could_claim_one_text_file_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.txt", "b.jpg", "b.png", "c.jpg"):
        (tmp_path / name).write_bytes(b"a cat")
    (conflict,) = text_files(tmp_path).conflicts()
    assert all(name in conflict for name in ("a.txt", "a.jpg", "a.png"))


@pytest.mark.reliability_row(16)
def test_two_text_files_for_one_image_are_ambiguous(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.TXT": "one", "a.txt": "two"})
    with pytest.raises(DataError, match=r"a\.TXT and a\.txt .*a\.png"):
        caption_of_first(tmp_path)


def write(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text)


def caption_of_first(folder: Path) -> tuple[str, ...]:
    reader = caption_reader(DatasetConfig(id="p", instance_data_dir=folder), scan_source(LocalFolder(folder)))
    return reader.read(reader.scan.images[0]).texts


@pytest.mark.parametrize(
    "name", ["a.txt", "a.png.txt", "a.caption", "a.png.caption", "a.TXT", "a.png.CAPTION"]
)
def test_a_caption_file_has_the_images_name_without_or_with_its_suffix(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"a.png": "", name: "a cat"})
    assert caption_of_first(tmp_path) == ("a cat",)


@pytest.mark.reliability_row(16)
def test_caption_files_of_one_text_are_one_caption_and_are_preferred_in_order(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.caption": "a cat\n", "a.png.txt": "a cat", "a.txt": "a cat\r\n"})
    reader = text_files(tmp_path, further_suffixes=(".caption",))
    (image,) = reader.scan.images
    assert [file.name for file in reader.caption_files(image)] == ["a.txt", "a.png.txt", "a.caption"]
    assert reader.read(image).texts == ("a cat",)


@pytest.mark.parametrize(
    "others", [("a.txt", "a.caption"), ("a.png.txt", "a.caption"), ("a.txt", "a.png.txt")]
)
@pytest.mark.reliability_row(16)
def test_caption_files_of_different_texts_are_an_error_that_names_both(
    tmp_path: Path, others: tuple[str, str]
) -> None:
    write(tmp_path, {"a.png": "", others[0]: "a cat", others[1]: "a dog"})
    with pytest.raises(DataError, match=f"{others[0]} and {others[1]} .* a.png"):
        caption_of_first(tmp_path)


@pytest.mark.reliability_row(16)
def test_whole_names_tell_two_images_of_one_stem_apart(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": "", "a.png": "", "a.jpg.txt": "a cat", "a.png.txt": "a dog"})
    reader = text_files(tmp_path)
    assert reader.conflicts() == []
    assert [reader.read(image).texts for image in reader.scan.images] == [("a cat",), ("a dog",)]
    write(tmp_path, {"a.txt": "a cat"})
    assert len(text_files(tmp_path).conflicts()) == 1


@pytest.mark.parametrize(
    ("texts", "options", "strategy"),
    [
        ({"a.txt": "x"}, {}, "textfile"),
        ({"a.caption": "x"}, {}, "textfile"),
        ({"a.png.txt": "x"}, {"instance_prompt": "sks"}, "textfile"),
        ({"readme.txt": "x"}, {}, "filename"),
        ({}, {}, "filename"),
        ({}, {"instance_prompt": "sks"}, "instanceprompt"),
        ({}, {"instance_prompt": "sks", "prepend_instance_prompt": True}, "filename"),
        ({"a.txt": "x"}, {"instance_prompt": "sks", "only_instance_prompt": True}, "instanceprompt"),
        ({"a.txt": "x"}, {"caption_strategy": "filename"}, "filename"),
    ],
)
def test_the_files_and_the_instance_prompt_choose_the_source_of_captions(
    tmp_path: Path, texts: dict[str, str], options: dict[str, object], strategy: str
) -> None:
    write(tmp_path, {"a.png": ""} | texts)
    config = DatasetConfig(id="p", instance_data_dir=tmp_path, **options)
    assert strategy_of(config, scan_source(LocalFolder(tmp_path))) == strategy

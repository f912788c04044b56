"""Captions out of JSON files beside the images, and out of tables of a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.captions import (
    MAX_CAPTION_CHARACTERS,
    CaptionReader,
    Captions,
    caption_reader,
    read_captions,
)
from simpletuner.helpers.data.metadata_captions import MetadataCaptions
from simpletuner.helpers.data.sources.base import FoundFile, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import DataError

NONE = Captions(texts=("",), note="empty")


def reader_of(folder: Path, strategy: str, **keys: Any) -> tuple[CaptionReader, dict[str, FoundFile]]:
    scan = scan_source(LocalFolder(folder))
    config = DatasetConfig(id="x", instance_data_dir=folder, caption_strategy=strategy, **keys)
    return caption_reader(config, scan), {image.name: image for image in scan.images}


def json_captions(folder: Path, content: bytes) -> Captions:
    (folder / "a.png").touch()
    (folder / "a.json").write_bytes(content)
    reader, images = reader_of(folder, "json")
    return reader.read(images["a.png"])


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ('"a cat"', Captions(("a cat",))),
        ('["a cat", " a dog ", "a cat", ""]', Captions(("a cat", "a dog"))),
        ('{"caption": "a cat", "text": "other"}', Captions(("a cat",))),
        ('{"score": 3, "captions": ["a cat", "a dog"]}', Captions(("a cat", "a dog"))),
        ('{"prompt": "a cat", "tags": "x"}', Captions(("a cat",))),
        ('{"tags": ["1girl", "smile"]}', Captions(("1girl, smile",))),
        ('{"tags": "1girl, smile"}', Captions(("1girl, smile",))),
        ('{"text": "空を飛ぶ猫\\nline two"}', Captions(("空を飛ぶ猫\nline two",))),
        ('\ufeff{"caption": "a cat", "id": ' + "9" * 5000 + "}", Captions(("a cat",))),
        ('{"caption": ""}', NONE),
        ('{"caption": null, "text": "a cat"}', NONE),
        ("[]", NONE),
        ('{"caption": [" "]}', NONE),
    ],
    ids=[
        *(
            "text",
            "array",
            "caption first",
            "several",
            "prompt",
            "tag list",
            "tags",
            "unicode",
            "long number",
        ),
        *("empty", "null", "empty array", "blank"),
    ],
)
def test_a_json_file_gives_its_captions(tmp_path: Path, content: str, captions: Captions) -> None:
    assert json_captions(tmp_path, content.encode()) == captions


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"seed": 1, "size": 2}', "seed, size"),
        (b"{}", "it has none"),
        (b"3", "3.0"),
        (b'{"caption": {"a": "b"}}', "caption is {'a': 'b'}"),
        (b'{"caption": ["a", 1]}', "caption is"),
        (b'{"caption": "a\\u0000b"}', "NUL"),
        (b'{"caption": "a\\ud800b"}', "surrogate"),
        ('{"caption": "Möwe"}'.encode("latin-1"), "not UTF-8"),
        (b'"' + b"x" * (1 << 20) + b'"', "over 1048576 bytes"),
    ],
    ids=[
        *("cut off", "no content", "deep", "other keys", "no keys", "number", "object", "mixed"),
        *("nul", "surrogate", "latin-1", "large"),
    ],
)
def test_a_json_file_without_captions_is_an_error_that_names_it(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=r"a\.json") as raised:
        json_captions(tmp_path, content)
    assert reason in str(raised.value)


def test_a_long_caption_is_cut_and_an_image_without_a_file_has_none(tmp_path: Path) -> None:
    found = json_captions(tmp_path, json.dumps({"caption": "word " * MAX_CAPTION_CHARACTERS}).encode())
    assert found.note == "shortened"
    assert len(found.texts[0]) <= MAX_CAPTION_CHARACTERS
    (tmp_path / "b.png").touch()
    reader, images = reader_of(tmp_path, "json")
    assert reader.read(images["b.png"]).note == "missing"


def test_one_json_file_of_two_images_is_a_conflict_and_a_whole_name_tells_them_apart(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.json").write_text('"both"')
    reader, _ = reader_of(tmp_path, "json")
    assert len(reader.conflicts()) == 1
    (tmp_path / "a.json").rename(tmp_path / "a.png.json")
    reader, images = reader_of(tmp_path, "json")
    assert reader.conflicts() == []
    assert [reader.read(images[name]).texts for name in ("a.png", "a.jpg")] == [("both",), ("",)]


def test_instance_prompt_may_stand_before_a_caption_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\n")
    keys = {"instance_prompt": "sks", "prepend_instance_prompt": True}
    reader, images = reader_of(tmp_path, "metadata", **keys)
    config = DatasetConfig(id="x", instance_data_dir=tmp_path, caption_strategy="metadata", **keys)
    assert read_captions(images["a.png"], config, reader).texts == ("sks a cat",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one in a subfolder."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).touch()
    return tmp_path


def captions_by_name(folder: Path) -> dict[str, tuple[str, ...]]:
    reader, images = reader_of(folder, "metadata")
    return {name: reader.read(image).texts for name, image in images.items()}


def test_a_jsonl_table_gives_the_captions_of_its_folder_and_those_below(folder: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "a\u2028cat", "score": 1},
        {"file_name": "./sub/c.png", "text": ["one", "two"]},
    ]
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    assert captions_by_name(folder) == {"a.png": ("a\u2028cat",), "b.png": ("",), "sub/c.png": ("one", "two")}


def test_a_csv_table_gives_the_captions_of_its_folder(folder: Path) -> None:
    (folder / "metadata.csv").write_text(
        'score,file_name,caption\r\n1,a.png,"a cat, on\r\na ""mat"""\r\n2,b.png,\r\n', newline=""
    )
    (folder / "sub" / "metadata.csv").write_text("file_name,prompt\nc.png,ein Kätzchen\n", encoding="utf-8")
    assert captions_by_name(folder) == {
        "a.png": ('a cat, on\r\na "mat"',),
        "b.png": ("",),
        "sub/c.png": ("ein Kätzchen",),
    }


def test_a_path_with_backslashes_names_its_image(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "sub\\\\c.png", "text": "x"}')
    assert captions_by_name(folder)["sub/c.png"] == ("x",)


def test_rows_without_an_image_are_listed(folder: Path) -> None:
    names = ("a.png", "gone.png", "../b.png", "/etc/passwd")
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names)
    )
    reader, _ = reader_of(folder, "metadata")
    assert isinstance(reader, MetadataCaptions)
    assert reader.unused() == ["gone.png", "../b.png", "/etc/passwd"]


def test_two_rows_with_different_captions_are_an_error_that_names_both(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,same\nb.png,same\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}')
    reader, images = reader_of(folder, "metadata")
    assert reader.read(images["b.png"]).texts == ("same",)
    with pytest.raises(DataError, match=r"metadata\.csv, line 2 and metadata\.jsonl, line 1.*a\.png"):
        reader.read(images["a.png"])


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name"', ["line 2", "not JSON"]),
        ("metadata.jsonl", b'["a.png", "x"]', ["line 1", "no JSON object"]),
        ("metadata.jsonl", b'\n{"text": "x"}', ["line 2", "file_name is missing"]),
        ("metadata.jsonl", b'{"file_name": 3, "text": "x"}', ["line 1", "file_name is 3.0"]),
        ("metadata.jsonl", b'{"file_name": "a.png", "label": "x"}', ["line 1", "file_name, label"]),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 5}', ["line 1", "text is 5.0"]),
        ("metadata.csv", b"name,text\na.png,x\n", ["line 2", "file_name is missing"]),
        ("metadata.csv", b"file_name,text\na.png,x, y\n", ["line 2", "more columns"]),
        ("metadata.csv", b'file_name,text\na.png,"x\n', ["after line 1"]),
        ("metadata.csv", "file_name,text\na.png,Möwe\n".encode("latin-1"), ["not UTF-8"]),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), ["not UTF-8"]),
    ],
    ids=range(11),
)
def test_a_table_that_cannot_be_used_is_an_error_with_its_line(
    folder: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as raised:
        reader_of(folder, "metadata")
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_not_utf_8_has_no_row(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff.png")).touch()
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert captions_by_name(folder)[os.fsdecode(b"\xff.png")] == ("",)

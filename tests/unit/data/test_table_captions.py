"""Captions of images in a folder that stand in a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.captions import caption_reader
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def texts(folder: Path, file: Path, **keys: Any) -> list[tuple[str, tuple[str, ...], str | None]]:
    """(name, captions, note) of each image."""
    parquet = {"path": file, "filename_column": "id"} | keys
    config = DatasetConfig(id="a", instance_data_dir=folder, parquet=parquet)
    reader = caption_reader(config, scan_entry(config))
    found = [(image.name, reader.read(image)) for image in reader.scan.images]
    return [(name, captions.texts, captions.note) for name, captions in found]


@pytest.mark.parametrize(
    "ids",
    [["1", "2.5", "x/3"], ["1.png", "2.5.jpg", "x/3.png"], ["./1.png", "2.5", "x\\3.png"], ["1", "2.5", "3"]],
    ids=["stems", "names", "mixed", "without folder"],
)
def test_a_row_belongs_to_the_image_of_its_name_with_or_without_suffix(
    tmp_path: Path, ids: list[str]
) -> None:
    folder = images(tmp_path / "images", "1.png", "2.5.jpg", "x/3.png", "4.png")
    table = tmp_path / "a.parquet"
    pandas.DataFrame({"id": ids, "caption": ["a", ["b", "c"], None]}).to_csv(tmp_path / "a.csv")
    pandas.DataFrame({"id": ids, "caption": [["a"], ["b", "c"], []]}).to_parquet(table)
    assert texts(folder, table) == [
        ("1.png", ("a",), None),
        ("2.5.jpg", ("b", "c"), None),
        ("4.png", ("",), "missing"),
        ("x/3.png", ("",), "empty"),
    ]


def test_numbers_are_names(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "1.png", "20.png")
    pandas.DataFrame({"id": [1.0, 20.0], "caption": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    assert [captions for _, captions, _ in texts(folder, tmp_path / "a.parquet")] == [("a",), ("b",)]


def test_the_fallback_column_stands_in_for_an_empty_caption(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "a.csv").write_text("id,caption,tags\n1,,x\n2,b,y\n")
    found = texts(folder, tmp_path / "a.csv", fallback_caption_column="tags")
    assert [captions for _, captions, _ in found] == [("x",), ("b",)]


@pytest.mark.reliability_row(16)
def test_a_name_without_a_folder_that_two_folders_have_is_an_error(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "x/1.png", "y/1.png")
    (tmp_path / "a.csv").write_text("id,caption\n1,a\n")
    with pytest.raises(DataError, match=r"1 could be an image of y and of x\. Write the folder into id"):
        texts(folder, tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("id,caption\nx/1,a\ny/1,b\n")
    assert [captions for _, captions, _ in texts(folder, tmp_path / "a.csv")] == [("a",), ("b",)]


def test_a_table_of_other_images_is_an_error_that_shows_both_names(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "1.png")
    (tmp_path / "a.csv").write_text("id,caption\nphoto-1,a\n")
    message = "the first name in id is photo-1, the first image is 1.png. Correct parquet.filename_column"
    with pytest.raises(DataError, match=re.escape(message)):
        texts(folder, tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"filename_column": "ids"},
            "parquet.filename_column 'ids' is no column. Did you mean id? Its columns are: id, words",
        ),
        ({}, "no column is known to hold captions"),
        ({"caption_column": "word"}, "caption_column 'word' is no column. Did you mean words?"),
    ],
    ids=["names", "unknown", "captions"],
)
def test_a_column_that_the_table_lacks_is_named(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    folder = images(tmp_path / "images", "1.png")
    (tmp_path / "a.csv").write_text("id,words\n1,a\n")
    with pytest.raises(DataError, match=re.escape(message)):
        texts(folder, tmp_path / "a.csv", **keys)

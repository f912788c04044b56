"""What the log says of a dataset's folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.choices import image_files
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.captions import CaptionColumn, caption_reader
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.scan_report import listed, report_captions, report_files, shown
from simpletuner.helpers.data.sources.base import scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.redaction import hide

Planned = Callable[..., tuple[TrainingData, list[str]]]


@pytest.fixture
def planned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Planned:
    """Makes a folder of these files and plans it; gives the data and the lines of the log."""
    caplog.set_level(logging.INFO)

    def plan(files: dict[str, str], **options: object) -> tuple[TrainingData, list[str]]:
        folder = tmp_path / "photos"
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if text == "image":
                Image.new("RGB", (64, 64)).save(folder / name, "PNG")
            else:
                (folder / name).write_text(text, encoding="utf-8")
        config = DatasetConfig(id="photos", instance_data_dir=folder, resolution=64, **options)
        stores = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
        data = TrainingData([config], stores, seed=1, batch_size=1, pixel_alignment=8)
        return data, [record.getMessage() for record in caplog.records]

    return plan


def line_with(lines: list[str], *parts: str) -> str:
    """The one line that holds all parts, in this order."""
    (line,) = [line for line in lines if re.search(".*".join(map(re.escape, parts)), line)]
    return line


@pytest.mark.parametrize(
    ("files", "options", "parts"),
    [
        ({"a_cat.png": "image", "b.png": "image", "b.txt": "a dog"}, {}, ["text files", "b.png", "'a dog'"]),
        ({"a_cat.png": "image"}, {}, ["file names", ".txt", ".caption", "a_cat.png", "'a cat'"]),
        ({"a_cat.png": "image"}, {"instance_prompt": "sks"}, ["instance_prompt", "'sks'"]),
    ],
)
def test_without_a_caption_strategy_the_start_says_where_captions_come_from(
    planned: Planned, files: dict[str, str], options: dict[str, object], parts: list[str]
) -> None:
    _, lines = planned(files, **options)
    line_with(lines, "caption_strategy is not set", *parts)


def test_with_a_caption_strategy_the_start_does_not_explain_it(planned: Planned) -> None:
    _, lines = planned({"a.png": "image", "a.txt": "x"}, caption_strategy="textfile")
    assert not [line for line in lines if "caption_strategy" in line or "not read" in line]


def test_files_that_are_not_read_are_counted_in_one_line_by_kind(planned: Planned) -> None:
    captions = {"a.json": "{}", "metadata.jsonl": "{}", "captions.csv": ""}
    others = {
        "notes.txt": "x",
        "a.npz": "",
        "_latent_cache/a.safetensors": "",
        "desktop.ini": "",
        "LICENSE": "",
    }
    data, lines = planned({"a.png": "image", "a.txt": "a cat"} | captions | others)
    line = line_with(lines, "8 files are not read", "1 text file", "notes.txt", "3 that may hold captions")
    assert "2 caches of tensors (_latent_cache/a.safetensors; a.npz)" in line
    assert all(name in line for name in (*captions, *others))
    assert [(each.path, "no image" in each.reason) for each in data.skipped] == [("notes.txt", True)]


@pytest.mark.parametrize(
    ("name", "level"),
    [("a.json", logging.WARNING), ("lost.txt", logging.WARNING), ("a.npz", logging.INFO)],
)
def test_only_files_that_may_hold_captions_are_a_warning(
    planned: Planned, caplog: pytest.LogCaptureFixture, name: str, level: int
) -> None:
    planned({"a.png": "image", "a.txt": "a cat", name: "x"})
    (record,) = [each for each in caplog.records if name in each.getMessage()]
    assert record.levelno == level


def test_many_images_of_one_unread_kind_are_one_line_with_their_number(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "find_spec", lambda _: None)
    phone = {f"{number:02}.{'HEIC' if number == 11 else 'heic'}": "image" for number in range(12)}
    data, lines = planned({"a.png": "image", "00.txt": "a cat", "b.psd": "x"} | phone)
    line = line_with(lines, "skipped 12 .heic", "00.heic", "and 7 more", "pillow-heif", "[formats]")
    assert "11.HEIC" not in line
    line_with(lines, "skipped 1 .psd", "b.psd", "save it as PNG")
    line_with(lines, "1 image (13 skipped)")
    assert {each.path for each in data.skipped} == {"b.psd", *phone}


@pytest.mark.parametrize(("number", "last"), [(1, "0"), (5, "4"), (6, "and 1 more")])
def test_five_texts_are_listed_and_the_others_counted(number: int, last: str) -> None:
    parts = listed(str(index) for index in [*range(number), 0]).split("; ")
    assert len(parts) == number
    assert parts[-1] == last


def test_masks_are_never_trained_and_named_as_conditioning_data_of_their_image(planned: Planned) -> None:
    masks = ["a-condlabel.png", "a-masklabel.png", "lost-masklabel.png"]
    data, lines = planned({"a.png": "image", "a.txt": "a cat"} | dict.fromkeys(masks, "image"))
    assert [sample.path for sample in data.samples] == ["a.png"]
    line_with(lines, "3 files", *masks, "2 of them are conditioning data")


def test_masks_without_their_image_are_counted(planned: Planned) -> None:
    _, lines = planned({"a.png": "image", "lost-masklabel.png": "image"})
    assert "conditioning data" not in line_with(lines, "1 file", "lost-masklabel.png", "No image")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"caption_strategy": "instanceprompt", "instance_prompt": "sks"},
            'caption_strategy is "instanceprompt"',
        ),
        ({"caption_strategy": "filename"}, 'caption_strategy is "filename"'),
        ({"only_instance_prompt": True, "instance_prompt": "sks"}, "only_instance_prompt is true"),
    ],
)
def test_text_files_beside_images_that_are_not_read_are_a_warning_with_the_reason(
    planned: Planned, options: dict[str, object], reason: str
) -> None:
    texts = {"a.txt": "a cat", "b.png.txt": "a dog", "b.caption": "a dog"}
    _, lines = planned({"a.png": "image", "b.png": "image", "c.png": "image"} | texts, **options)
    line_with(lines, "3 text files beside the images are not read", reason, "a.txt", "textfile")


def test_the_start_says_how_many_images_have_several_captions_and_shows_one(planned: Planned) -> None:
    files = {"a.png": "image", "a.txt": "one", "b.png": "image", "b.txt": "one\ntwo\nthree"}
    data, lines = planned(files)
    assert data.captions() == ("one", "two", "three")
    line_with(lines, "1 of 2 images has several captions", "3 of b.png", "'one' or 'two'", "caption_lines")
    assert not [line for line in lines if "as a whole" in line]


def test_the_start_says_how_many_captions_of_several_lines_are_whole_and_shows_one(planned: Planned) -> None:
    files = {"a.png": "image", "a.txt": "one", "b.png": "image", "b.txt": "one\ntwo"}
    data, lines = planned(files, caption_lines="whole")
    assert data.captions() == ("one", "one\ntwo")
    line_with(lines, "1 of 2 images has a caption of several lines", "as a whole", "b.png", r"'one\\ntwo'")
    assert not [line for line in lines if "several captions" in line]


def test_a_folder_of_images_that_are_not_read_is_an_error_that_names_them(planned: Planned) -> None:
    with pytest.raises(DataError, match=r"no image .*a\.psd: its format is not read"):
        planned({"a.psd": "x"})


def test_beginning_of_a_caption_is_redacted_before_it_is_cut() -> None:
    hide("secret" * 20, "{env:KEY}")
    assert shown("secret" * 20) == "'{env:KEY}'"


def test_json_files_and_tables_are_captions_where_caption_strategy_reads_them(planned: Planned) -> None:
    files = {"b.png": "image", "b.json": '{"caption": "a cat"}', "lost.json": "{}"}
    data, lines = planned(files, caption_strategy="json")
    assert [sample.caption for sample in data.samples] == ["a cat"]
    assert "b.json" not in line_with(lines, "1 file is not read", "lost.json")
    assert not data.skipped
    rows = '{"file_name": "b.png", "text": "a dog"}\n{"file_name": "gone.png", "text": "x"}'
    data, lines = planned({"metadata.jsonl": rows}, caption_strategy="metadata")
    assert [sample.caption for sample in data.samples] == ["a dog"]
    line_with(lines, "1 row of the captions names no image", "gone.png")
    line_with(lines, "2 files are not read", "b.json", "lost.json")


def test_a_json_file_that_is_not_read_is_a_warning_with_the_value_that_reads_it(planned: Planned) -> None:
    _, lines = planned({"a.png": "image", "a.json": "{}", "metadata.csv": ""})
    line = line_with(lines, "2 files are not read", "may hold captions", '"json"', '"metadata"')
    assert "a.json" in line
    assert "metadata.csv" in line


def test_captions_of_a_table_are_reported_as_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "list.csv").write_text("filename,caption,text\na,one,two\n")
    table = {"path": tmp_path / "list.csv", "caption_column": ["caption", "text"]}
    config = DatasetConfig(id="x", instance_data_dir=tmp_path, parquet=table)
    scan = scan_source(LocalFolder(tmp_path))
    reader = caption_reader(config, scan)
    files = list(scan.images)
    with caplog.at_level("INFO"):
        report_files(config, scan, reader)
        report_captions(
            config, scan.images.names, CaptionColumn.of([reader.read(file) for file in files]), reader=reader
        )
    text = caplog.text
    assert "captions come from the table, for instance a.png: 'one'" in text
    assert "the image has several captions; each time" in text
    assert "caption_lines" not in text
    assert "list.csv" not in text

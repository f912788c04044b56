"""Rows of tables as images: what is listed, read, skipped and refused, and their captions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.captions import caption_reader, strategy_of
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.index import ImageIndex
from simpletuner.helpers.data.sources import parquet
from simpletuner.helpers.data.sources.base import Scan
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError
from tests.tables import embedded, png, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images/0.png to images/3.png."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    return tmp_path


def dataset(file: Path, **keys: Any) -> DatasetConfig:
    return DatasetConfig(id="rows", type="table", table_file=file, **keys)


def captions(config: DatasetConfig, scan: Scan | None = None) -> dict[str, tuple[str, ...]]:
    """Name -> captions of each image."""
    reader = caption_reader(config, scan or scan_entry(config))
    return {image.name: reader.read(image).texts for image in reader.scan.images}


def csv(folder: Path, text: str, *, name: str = "list.csv", encoding: str = "utf-8") -> DatasetConfig:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return dataset(file)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "bar"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_file_is_read_with_its_separator_and_quotation_marks(
    folder: Path, separator: str, encoding: str
) -> None:
    rows = [("file_name", "text"), ("images/0.png", f'"a{separator} ""b""\r\nc"'), ("images/1.png", " ü ")]
    text = "\r\n".join(separator.join(row) for row in rows)
    found = captions(csv(folder, f"{text}\r\n\r\n", encoding=encoding))
    assert found == {"images/0.png": (f'a{separator} "b"\nc',), "images/1.png": ("ü",)}


def test_a_tsv_file_is_read_by_tabs_alone(folder: Path) -> None:
    config = csv(folder, "path\tcaption\nimages/0.png\ta, b, c, d\n", name="list.tsv")
    assert captions(config) == {"images/0.png": ("a, b, c, d",)}


@pytest.mark.reliability_row(13)
@pytest.mark.reliability_row(21)
def test_a_row_that_names_no_image_is_skipped_with_its_line_and_its_reason(folder: Path) -> None:
    os.symlink("/etc", folder / "away")
    os.mkfifo(folder / "pipe.png")
    long = "a\\" + "b" * 300
    config = csv(
        folder,
        "path,caption\nimages/0.png,a\nimages/9.png,b\nimages/1.png\n,c\n../x.png,d\n/etc/x.png,e\n"
        "ftp://bucket/x.png,f\naway/passwd,g\npipe.png,h\nimages/./2.png,i\nimages,j\n"
        f"http://[1/x.png,k\n{long},l\n",
    )
    scan = scan_entry(config.model_copy(update={"instance_data_dir": folder}))
    assert [image.name for image in scan.images] == ["images/0.png", "images/2.png"]
    assert dict(scan.skipped) == {
        "images/9.png": f"no such file from {folder}",
        "line 4": "it has 1 cells and the header has 2",
        "line 5": "it names no image",
        "line 6": "its path ../x.png leaves the folder of the images",
        "line 7": "its path /etc/x.png leaves instance_data_dir",
        "line 8": "ftp:// is not supported; give a path or the URL of a file",
        "away/passwd": "it is a link that leaves the folder of the images",
        "pipe.png": "it is no regular file",
        "images": "it is no regular file",
        "line 13": "it is no URL: Invalid IPv6 URL",
        long.replace("\\", "/"): f"no such file from {folder}",
    }


def test_a_path_may_be_absolute_if_nothing_else_says_where_images_lie(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    config = csv(tmp_path / "lists", f"path,caption\n{folder}/images/0.png,a\n")
    (image,) = scan_entry(config).images
    assert image.source.read(image, limit=10**6) == png(0)


def test_paths_begin_at_instance_data_dir_or_at_the_folder_of_the_table(folder: Path) -> None:
    (folder / "lists").mkdir()
    config = csv(folder / "lists", "path,caption\n0.png,a\nimages\\1.png,b\n")
    assert not scan_entry(config).images
    inside = config.model_copy(update={"instance_data_dir": folder / "images"})
    assert [image.name for image in scan_entry(inside).images] == ["0.png"]
    above = config.model_copy(update={"instance_data_dir": folder})
    assert [image.name for image in scan_entry(above).images] == ["images/1.png"]


@pytest.mark.reliability_row(16)
@pytest.mark.parametrize(
    "urls",
    [
        ("s3://pets/a.png", "gs://pets/a.png"),
        ("abfss://cats@pets.dfs.core.windows.net/a.png", "abfss://dogs@pets.dfs.core.windows.net/a.png"),
        ("s3://pets/a#1.png", "s3://pets/a#2.png"),
    ],
    ids=["stores", "containers", "keys"],
)
def test_objects_whose_names_differ_in_what_is_not_shown_are_images_each(
    urls: tuple[str, str], folder: Path
) -> None:
    config = csv(folder, "image,caption\n" + "".join(f"{url},caption {url[:2]}\n" for url in urls))
    assert len({each.name for each in scan_entry(config).images}) == 2


def test_rows_of_one_image_are_its_captions(folder: Path) -> None:
    config = csv(folder, "path,caption\nimages/0.png,a\nimages/1.png,b\n./images/0.png,c\nimages/0.png,a\n")
    assert captions(config) == {"images/0.png": ("a", "c"), "images/1.png": ("b",)}


@pytest.mark.reliability_row(15)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty. Its first line must name the columns"),
        ("path,caption\nimages/0.png,é\n".encode("latin-1"), r"not UTF-8 \(byte 0xe9\).*Save it as UTF-8"),
        ("path,caption\nimages/0.png,a\n".encode("utf-16"), r"not UTF-8 \(byte 0xff\)"),
        (b'path,caption\nimages/0.png,"a\nimages/1.png,b\n', "line 3: .*quotation marks"),
        (b"path,caption,path\n", "two columns are named 'path'"),
        (b"path,caption\nimages/0.png,a\0b\n", "NUL|quotation"),
        (b"a,b\n1,2\n", "no column is known to hold images. Set image_column. Its columns are: a, b"),
        (b"path,b\n1,2\n", "no column is known to hold captions. Set caption_column. Its columns are"),
    ],
    ids=["empty", "latin-1", "utf-16", "open quote", "twice", "NUL", "no image", "no caption"],
)
def test_a_csv_file_that_cannot_be_read_is_named(folder: Path, data: bytes, message: str) -> None:
    (folder / "list.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        captions(dataset(folder / "list.csv"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_column": "pth"}, "image_column 'pth' is no column. .*columns are: path, caption"),
        ({"caption_column": ["captoin"]}, "caption_column 'captoin' is no column. Did you mean caption?"),
        ({"fallback_caption_column": "tags"}, "fallback_caption_column 'tags' is no column"),
        ({"row_filter": {"score": {"min": 1}}}, "row_filter 'score' is no column"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_name_of_a_column_is_an_error_with_the_columns_there_are(
    folder: Path, keys: dict[str, Any], message: str
) -> None:
    config = csv(folder, "path,caption\nimages/0.png,a\n")
    with pytest.raises(DataError, match=message):
        scan_entry(dataset(folder / "list.csv", **keys))
    assert config.table_file == folder / "list.csv"


@pytest.mark.reliability_row(15)
def test_lines_of_a_jsonl_file_give_captions_of_any_kind(folder: Path) -> None:
    rows: list[Any] = [
        {"image": "images/0.png", "about": {"short": "a", "long": ["b", "", None, "c"]}},
        {"image": "images/1.png", "about": {"short": float("nan"), "long": []}, "tags": "x, y"},
        {"image": "images/2.png", "tags": 7},
    ]
    lines = [
        b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(),
        b"",
        *(json.dumps(row).encode() for row in rows[1:]),
    ]
    lines += [b"{", b"[1]", b'{"image": "\xe9"}', b"[" * 100_000]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    columns = {"caption_column": ["about.short", "about.long"], "fallback_caption_column": "tags"}
    config = dataset(folder / "rows.jsonl", **columns)
    scan = scan_entry(config)
    assert captions(config, scan) == {
        "images/0.png": ("a", "b", "c"),
        "images/1.png": ("x, y",),
        "images/2.png": ("7",),
    }
    reasons = dict(scan.skipped)
    assert reasons.keys() == {"line 5", "line 6", "line 7", "line 8"}
    assert "no JSON" in reasons["line 5"]
    assert "no JSON object" in reasons["line 6"]
    assert "not UTF-8 (byte 0xe9)" in reasons["line 7"]
    assert captions(dataset(folder / "rows.jsonl", caption_column="tags"))["images/0.png"] == ("",)
    with pytest.raises(DataError, match=r"line 1: the caption in about: it has fields \(short, long\)"):
        captions(dataset(folder / "rows.jsonl", caption_column="about"))


def test_a_caption_with_a_nul_names_its_row(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"image": "images/0.png", "text": "a\\u0000"}')
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: the caption in text: it holds a NUL"):
        captions(dataset(folder / "rows.jsonl"))


def test_a_file_without_objects_is_no_jsonl(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("[1, 2]\n")
    with pytest.raises(DataError, match="must hold a JSON object on each line"):
        scan_entry(dataset(folder / "rows.jsonl"))


@pytest.mark.parametrize("group", [1, 3, 100])
def test_images_in_a_parquet_file_are_read_in_any_order(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    monkeypatch.setattr(parquet, "KEPT_BATCHES", 1)
    files = [png(number, edge=16) for number in range(10)]
    config = dataset(
        write(embedded(files, text=[str(n) for n in range(10)]), tmp_path / "a.parquet", group=group)
    )
    scan = scan_entry(config)
    assert [image.name for image in scan.images] == [f"{number:06d}" for number in range(10)]
    for order in (range(10), (9, 0, 5, 4, 9), reversed(range(10))):
        for number in order:
            image = scan.images[number]
            assert image.source.read(image, limit=10**6) == files[number]
    assert captions(config, scan)["000007"] == ("7",)
    assert scan.images[7].place == f"{tmp_path / 'a.parquet'}, row 7"


@pytest.mark.parametrize(
    "images",
    [
        [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}],
        [png(0), png(1)],
        [{"bytes": None, "path": "images/0.png"}, {"bytes": None, "path": "images/1.png"}],
        ["images/0.png", "images/1.png"],
    ],
    ids=["objects", "bytes", "paths in objects", "paths"],
)
def test_what_pandas_writes_is_read(folder: Path, images: list[object]) -> None:
    pandas.DataFrame({"image": images, "caption": ["a", None]}).to_parquet(folder / "a.parquet")
    config = dataset(folder / "a.parquet")
    scan = scan_entry(config)
    assert [image.source.read(image, limit=10**6) for image in scan.images] == [png(0), png(1)]
    assert list(captions(config, scan).values()) == [("a",), ("",)]


@pytest.mark.reliability_row(13)
def test_a_damaged_part_of_a_parquet_file_skips_its_rows_alone(tmp_path: Path) -> None:
    files = [png(number) for number in range(6)]
    file = write(embedded([*files[:4], None, files[5]], text=list("abcdef")), tmp_path / "a.parquet", group=2)
    data = bytearray(file.read_bytes())
    chunk = pyarrow.parquet.read_metadata(file).row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 8] = bytes(8)
    file.write_bytes(data)
    index = ImageIndex(tmp_path / "index.json")
    problems = [index.info(image).problem for image in scan_entry(dataset(file)).images]
    assert [str(problem)[:27] for problem in problems] == [
        *("None", "None"),
        *("the table is damaged here: ",) * 2,
        "its row holds no image",
        "None",
    ]


@pytest.mark.reliability_row(13)
@pytest.mark.parametrize("part", [0, 100, -200])
def test_a_parquet_file_that_was_cut_is_an_error(tmp_path: Path, part: int) -> None:
    file = write(embedded([png(0)], text=["a"]), tmp_path / "a.parquet")
    file.write_bytes(file.read_bytes()[:part])
    with pytest.raises(DataError, match=r"a\.parquet: it is no parquet file, or damaged"):
        scan_entry(dataset(file))


@pytest.mark.reliability_row(14)
def test_an_image_above_the_limit_is_not_decoded(tmp_path: Path) -> None:
    (image,) = scan_entry(dataset(write(embedded([png(0)], text=["a"]), tmp_path / "a.parquet"))).images
    with pytest.raises(DataError, match="it is over 100 bytes"):
        image.source.read(image, limit=100)


@pytest.mark.reliability_row(17)
def test_a_changed_table_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.index._RACY_NS", -1)
    file = write(embedded([png(0), png(1)], text=["a", "b"]), tmp_path / "a.parquet")

    def digests() -> list[str]:
        index = ImageIndex(tmp_path / "index.json")
        found = [index.info(image).digest for image in scan_entry(dataset(file)).images]
        index.save()
        return found

    first = digests()
    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetTable, "cell", None)
        assert digests() == first
    state = file.stat()
    write(embedded([png(0), png(2)], text=["a", "b"]), file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests()[0] == first[0]
    assert digests()[1] != first[1]


def test_a_filter_keeps_the_rows_that_meet_every_condition(folder: Path) -> None:
    rows = ("path,caption,score,kind", "0.png,a,5,x", "1.png,b,7.5,y", "2.png,c,,x", "3.png,d,9,x")
    csv(folder / "images", "\n".join(rows))
    names = [
        [image.name[0] for image in scan_entry(dataset(folder / "images/list.csv", row_filter=each)).images]
        for each in (
            {"score": {"min": 7.5}},
            {"score": {"max": 7.5}},
            {"score": {"min": 6, "max": 8}},
            {"kind": "x"},
            {"kind": ["x", "z"], "score": {"min": 0}},
            {"score": [9, 5]},
            {},
        )
    ]
    assert list(map("".join, names)) == ["13", "01", "1", "023", "03", "03", "0123"]


@pytest.mark.parametrize(
    ("keys", "strategy"),
    [
        ({}, "table"),
        ({"caption_strategy": "csv"}, "table"),
        ({"caption_strategy": "filename"}, "filename"),
        ({"only_instance_prompt": True, "instance_prompt": "sks"}, "instanceprompt"),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "sks"}, "instanceprompt"),
        ({"instance_prompt": "sks"}, "table"),
    ],
)
def test_captions_come_from_the_table_unless_the_configuration_says_otherwise(
    folder: Path, keys: dict[str, Any], strategy: str
) -> None:
    csv(folder, "path,caption\nimages/0.png,a\n")
    config = dataset(folder / "list.csv", **keys)
    assert strategy_of(config, scan_entry(config)) == strategy


def test_a_table_without_captions_is_trained_with_the_instance_prompt(folder: Path) -> None:
    csv(folder, "path,size\nimages/0.png,1\n")
    assert captions(dataset(folder / "list.csv", instance_prompt="sks")) == {"images/0.png": ("sks",)}


def test_a_long_caption_is_shortened(folder: Path) -> None:
    (image,) = captions(csv(folder, f"path,caption\nimages/0.png,{'word ' * 5000}\n")).values()
    assert 8000 < len(image[0]) <= 8192


def test_memory_does_not_grow_with_the_rows_that_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 1)
    monkeypatch.setattr(parquet, "KEPT_BATCHES", 2)
    file = write(embedded([png(number, edge=16) for number in range(8)]), tmp_path / "a.parquet")
    cursor = parquet._Cursor(pyarrow.parquet.ParquetFile(file), "image")
    for row in range(8):
        cursor.cell(row)
        assert len(cursor._kept) <= 2


def test_a_large_row_group_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 20_000)
    table = embedded([png(0), png(1)], text=["a", "b"])
    scan_entry(dataset(write(table, tmp_path / "a.parquet", group=1)))
    assert not caplog.records
    scan_entry(dataset(write(table, tmp_path / "b.parquet", group=2)))
    assert "b.parquet: a row group of 2 rows has 0 MiB" in caplog.text


def test_a_filter_compares_values_of_any_kind_as_texts(folder: Path) -> None:
    rows = [{"image": f"images/{n}.png", "text": "a", "x": x} for n, x in enumerate([True, 2.0, "2", None])]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for wanted, names in ((True, "0"), (2, "12"), ([False, "2"], "12")):
        scan = scan_entry(dataset(folder / "rows.jsonl", row_filter={"x": wanted}))
        assert "".join(image.name[7] for image in scan.images) == names


def test_some_of_the_images_in_a_parquet_file_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(embedded([png(seed) for seed in range(40)], text=["a"] * 40), tmp_path / "a.parquet")
    config = DatasetConfig(id="a", type="table", table_file=file, resolution=64, max_num_samples=10)
    rows: list[int] = []
    cell = parquet.ParquetTable.cell

    def noting(table: parquet.ParquetTable, column: str, row: int) -> object:
        rows.append(row)
        return cell(table, column, row)

    monkeypatch.setattr(parquet.ParquetTable, "cell", noting)
    data = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
    TrainingData([config], data, seed=1, batch_size=1, pixel_alignment=64)
    assert len(rows) == 10
    assert rows == sorted(rows)


def test_a_column_that_first_occurs_late_in_a_jsonl_file_is_found(folder: Path) -> None:
    lines = [{"file_name": "images/0.png"} for _ in range(150)]
    late = {"file_name": "images/1.png", "caption": "late", "place": {"name": "here"}}
    text = "\n".join(json.dumps(each) for each in (*lines, late))
    (folder / "list.jsonl").write_text(text)
    config = dataset(folder / "list.jsonl", row_filter={"place.name": ["here"]})
    assert captions(config) == {"images/1.png": ("late",)}


def test_a_cell_of_the_filter_that_is_not_utf_8_names_its_table_and_column(tmp_path: Path) -> None:
    words = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 1], np.int32)), pyarrow.py_buffer(b"\xff")]
    )
    file = write(pyarrow.table({"path": ["a.png"], "text": ["x"], "kind": words}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"list\.parquet: kind: row 0 is not UTF-8"):
        scan_entry(dataset(file, row_filter={"kind": ["x"]}))

"""Which images a folder holds."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from simpletuner.helpers.choices import image_files
from simpletuner.helpers.data.sources.base import read_bounded, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import DataError
from tests.counted import builtin_calls, lines_run


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def image_names(folder: Path) -> list[str]:
    return [file.name for file in scan_source(LocalFolder(folder)).images]


def test_scan_folder_finds_images_and_captions_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "B.PNG", "a.webp", "a.txt", "sub/c.tiff", "sub/c.TXT", "notes.md", "sub-2/d.png")
    scan = scan_source(LocalFolder(tmp_path))
    assert [file.name for file in scan.images] == ["B.PNG", "a.webp", "b.jpg", "sub/c.tiff", "sub-2/d.png"]
    assert sorted(scan.captions) == ["a", "sub/c"]
    assert scan.skipped == ()
    assert scan.others == ("notes.md",)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".pjpeg", ".JFIF", ".avif"])
def test_scan_folder_reads_the_other_suffixes_of_images(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a{suffix}")
    assert image_names(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".jxl"])
def test_an_image_whose_package_is_missing_is_unread_with_the_package_to_install(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, f"a{suffix}")
    monkeypatch.setattr(image_files, "find_spec", lambda _: None)
    ((name, reason),) = scan_source(LocalFolder(tmp_path)).unread
    assert name == f"a{suffix}"
    assert "pillow-" in reason
    assert "simpletuner-t[formats]" in reason
    monkeypatch.setattr(image_files, "find_spec", lambda _: object())
    assert image_names(tmp_path) == [f"a{suffix}"]


def test_scan_folder_tells_masks_and_files_of_other_kinds_apart_from_images(tmp_path: Path) -> None:
    masks = ("a-masklabel.png", "a-condlabel.PNG", "sub/b-MASKLABEL.png", "sub/_controls/b.depth.jpg")
    others = ("._hidden.json", "a.json", "a.npz", "metadata.jsonl", "noextension")
    touch(tmp_path, "a.png", "sub/b.png", "c.psd", "c.svg", *masks, *others)
    scan = scan_source(LocalFolder(tmp_path))
    assert [file.name for file in scan.images] == ["a.png", "sub/b.png"]
    assert sorted(scan.conditioning) == sorted(masks)
    assert [name for name, _ in scan.unread] == ["c.psd", "c.svg"]
    assert scan.others == ("a.npz", "noextension")
    assert [file.name for file in scan.captions["a"]] == ["a.json"]
    assert [file.name for file in scan.tables] == ["metadata.jsonl"]


def test_orphans_are_caption_files_without_an_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.txt", "a.png.txt", "b.psd", "b.txt", "c.txt", "sub/a.txt", "d.caption")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    touch(tmp_path, "gone.txt")
    assert [file.name for file in scan_source(LocalFolder(tmp_path)).orphans()] == [
        "c.txt",
        "d.caption",
        "sub/a.txt",
    ]


def test_a_json_file_without_an_image_is_a_stray_and_no_orphan(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.json", "a.png.json", "b.JSON", "sub/a.json", "sub/c.txt")
    scan = scan_source(LocalFolder(tmp_path))
    assert [file.name for file in scan.strays()] == ["b.JSON", "sub/a.json"]
    assert [file.name for file in scan.orphans()] == ["sub/c.txt"]


def test_tables_are_found_in_every_folder_by_their_name_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "metadata.csv", "sub/Metadata.JSONL", "my metadata.csv", "metadata.parquet")
    scan = scan_source(LocalFolder(tmp_path))
    assert [file.name for file in scan.tables] == ["metadata.csv", "sub/Metadata.JSONL"]
    assert scan.others == ("metadata.parquet", "my metadata.csv")


def test_scan_folder_passes_over_hidden_files(tmp_path: Path) -> None:
    touch(tmp_path, "._a.jpg", ".thumbnails/a.jpg", "a.jpg")
    assert image_names(tmp_path) == ["a.jpg"]


@pytest.mark.reliability_row(16)
def test_names_that_differ_by_case_or_folder_are_different_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "A.jpg", "sub/a.jpg")
    assert sorted(image_names(tmp_path)) == ["A.jpg", "a.jpg", "sub/a.jpg"]


@pytest.mark.reliability_row(19)
def test_specials_are_skipped_with_a_reason_and_the_scan_ends(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "a.jpg", "sub/b.jpg")
    touch(tmp_path, "outside.jpg", "other/c.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    (root / "dangling.jpg").symlink_to(root / "nothing.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "out.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "in.jpg").symlink_to(root / "a.jpg")
    (root / "notes.md").symlink_to(tmp_path / "other" / "c.jpg")
    (root / "up").symlink_to(root)
    (root / "aside").symlink_to(tmp_path / "other")
    (root / "sub" / "loop").symlink_to(root / "sub")
    scan = scan_source(LocalFolder(root))
    assert [file.name for file in scan.images] == ["a.jpg", "in.jpg", "sub/b.jpg"]
    assert dict(scan.skipped) == {
        "pipe.jpg": "it is not a regular file",
        "dangling.jpg": "it is a link to nothing",
        "loop.jpg": "it is a link to nothing",
        "out.jpg": "it is a link that leaves the dataset's folder",
        "up": "it is a link to a folder",
        "aside": "it is a link to a folder",
        "sub/loop": "it is a link to a folder",
    }
    assert scan.others == ("notes.md",)


@pytest.mark.reliability_row(19)
def test_a_path_beyond_255_bytes_is_found(tmp_path: Path) -> None:
    name = "/".join(["d" * 100] * 4 + ["e" * 250 + ".jpg"])
    touch(tmp_path, name)
    assert image_names(tmp_path) == [name]


@pytest.mark.reliability_row(20)
def test_any_name_that_the_file_system_allows_is_found(tmp_path: Path) -> None:
    names = [
        "🐈.jpg",
        "a\u0301.jpg",
        "\u202eright.jpg",
        "-dash.jpg",
        "new\nline.jpg",
        os.fsdecode(b"\xff.jpg"),
    ]
    touch(tmp_path, *names)
    assert sorted(image_names(tmp_path)) == sorted(names)


def test_the_dataset_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path / "real", "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert image_names(tmp_path / "link") == ["a.jpg"]


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        touch(tmp_path, "dataset")
    with pytest.raises(DataError, match=r"dataset.*Check instance_data_dir"):
        scan_source(LocalFolder(tmp_path / "dataset"))


def numbered_files(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").touch()
    return folder


@pytest.mark.reliability_row(19)
def test_a_scan_asks_for_the_facts_of_a_file_once_and_does_not_open_it(tmp_path: Path) -> None:
    few, many = (numbered_files(tmp_path / str(count), count) for count in (10, 110))
    scan_source(LocalFolder(few))  # imports what it needs
    grown = builtin_calls(lambda: scan_source(LocalFolder(many))) - builtin_calls(
        lambda: scan_source(LocalFolder(few))
    )
    asking = re.compile("stat|open|read|access|scandir|listdir")
    assert {name: count for name, count in grown.items() if asking.search(name)} == {"DirEntry.stat": 100}


@pytest.mark.reliability_row(19)
def test_the_work_of_a_scan_grows_with_the_number_of_files_and_is_little_for_each(tmp_path: Path) -> None:
    few, many = (numbered_files(tmp_path / str(count), count) for count in (200, 2000))
    scan_source(LocalFolder(few))  # imports what it needs
    lines = [lines_run(lambda folder=folder: scan_source(LocalFolder(folder))) for folder in (few, many)]
    # 10^5 files are scanned in 5 s of CPU time at 50 us for each, which is 500 lines.
    assert lines[1] < 50 * 2000
    assert lines[1] < 11 * lines[0]


def test_read_bounded_refuses_a_larger_file_a_pipe_and_a_missing_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (file,) = scan_source(LocalFolder(tmp_path)).images
    assert read_bounded(file, limit=1) == b"x"
    with pytest.raises(DataError, match="over 0 bytes"):
        read_bounded(file, limit=0)
    Path(file.place).unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_bounded(file, limit=1)
    os.mkfifo(Path(file.place))
    with pytest.raises(DataError, match="not a regular file"):
        read_bounded(file, limit=1)


def test_a_file_is_read_byte_by_byte_where_no_open_is_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"\x89PNG\r\n\x1a\n"
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.delattr(os, "O_NONBLOCK")
    (image,) = scan_source(LocalFolder(tmp_path)).images
    assert read_bounded(image, limit=100) == content

"""What is remembered about image files, and when it is not trusted."""

from __future__ import annotations

import io
import logging
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data import index as index_module
from simpletuner.helpers.data.index import ImageIndex, ImageInfo
from simpletuner.helpers.data.sources.base import FoundFile, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.io.faults import StorageError


def bmp(color: str, size: tuple[int, int] = (20, 10)) -> bytes:
    """An image whose length does not depend on its colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bmp").write_bytes(bmp("red"))
    return tmp_path / "data"


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The contents that were decoded; times lie far enough back to be trusted."""
    contents: list[bytes] = []
    original = index_module.inspect_image

    def recorded(data: bytes) -> Size:
        contents.append(data)
        return original(data)

    monkeypatch.setattr(index_module, "inspect_image", recorded)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10_000_000_000)
    return contents


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, inspected: list[bytes]) -> list[str]:
    """The names of the files whose bytes were read."""
    names: list[str] = []
    original = index_module.read_bounded

    def recorded(file: FoundFile, *, limit: int) -> bytes:
        names.append(file.name)
        return original(file, limit=limit)

    monkeypatch.setattr(index_module, "read_bounded", recorded)
    return names


def found(folder: Path) -> FoundFile:
    return scan_source(LocalFolder(folder)).images[0]


def wait_for_the_clock_of_the_files(file: Path) -> None:
    """Return once a change would get a later time than this file has: clocks of file systems are coarse."""
    probe = file.with_name("probe")
    while not probe.exists() or probe.stat().st_ctime_ns <= file.stat().st_ctime_ns:
        probe.write_bytes(b"")
    probe.unlink()


def info(folder: Path) -> ImageInfo:
    index = ImageIndex(folder.parent / "index.json")
    result = index.info(found(folder))
    index.save()
    return result


def test_an_unchanged_file_is_not_inspected_again(folder: Path, inspected: list[bytes]) -> None:
    first = info(folder)
    assert first.size == Size(height=10, width=20)
    written = (folder.parent / "index.json").stat()
    assert info(folder) == first
    assert len(inspected) == 1
    assert (folder.parent / "index.json").stat() == written


def test_an_unchanged_file_is_not_even_read_again(folder: Path, read: list[str]) -> None:
    assert not ImageIndex(folder.parent / "index.json").knows(found(folder))
    info(folder)
    assert ImageIndex(folder.parent / "index.json").knows(found(folder))
    info(folder)
    info(folder)
    assert read == ["a.bmp"]


@pytest.mark.reliability_row(17)
def test_an_image_edited_in_place_with_its_times_set_back_is_read_again(
    folder: Path, inspected: list[bytes]
) -> None:
    first, before = info(folder), Path(found(folder).place).stat()
    wait_for_the_clock_of_the_files(Path(found(folder).place))
    with Path(found(folder).place).open("r+b") as file:
        file.write(bmp("blue"))
    os.utime(Path(found(folder).place), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Path(found(folder).place).stat().st_mtime_ns == before.st_mtime_ns
    assert Path(found(folder).place).stat().st_ino == before.st_ino
    assert info(folder).digest != first.digest
    assert len(inspected) == 2


@pytest.mark.reliability_row(17)
def test_a_file_that_changed_just_now_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_ns = Path(found(folder).place).stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: changed_ns + 1_900_000_000)
    first = info(folder)
    assert b"a.bmp" not in (folder.parent / "index.json").read_bytes()
    assert info(folder) == first


def test_a_moved_file_is_not_decoded_again(folder: Path, inspected: list[bytes]) -> None:
    first = info(folder)
    Path(found(folder).place).rename(folder / "b.bmp")
    assert info(folder) == first
    assert len(inspected) == 1


def test_a_broken_image_is_remembered_with_its_reason(folder: Path, inspected: list[bytes]) -> None:
    Path(found(folder).place).write_bytes(b"<html>")
    assert "web page" in str(info(folder).problem)
    assert info(folder).size is None
    assert len(inspected) == 1


@pytest.mark.parametrize("damage", [b"", b"[]", b"[1, 2]", b'["x", "{}"]', b"\xff", b"null"])
@pytest.mark.reliability_row(18)
def test_a_damaged_index_is_made_again(folder: Path, inspected: list[bytes], damage: bytes) -> None:
    first = info(folder)
    (folder.parent / "index.json").write_bytes(damage)
    assert info(folder) == first
    assert len(inspected) == 2
    assert info(folder) == first
    assert len(inspected) == 2


def test_an_index_of_another_decoder_is_not_trusted(
    folder: Path, inspected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    info(folder)
    monkeypatch.setattr(index_module, "_VERSION", "another")
    info(folder)
    assert len(inspected) == 2


def test_a_vanished_file_has_a_problem_and_no_digest(folder: Path) -> None:
    file = found(folder)
    Path(file.place).unlink()
    result = ImageIndex(folder.parent / "index.json").info(file)
    assert result.digest == ""
    assert "No such file" in str(result.problem)


@pytest.fixture
def locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache that is not written to while a file `locked` lies in it."""
    original = index_module.write_content

    def write(file: Path, *content: object, **options: object) -> None:
        if (file.parent / "locked").exists():
            raise StorageError(f"{file}: no permission to write.")
        original(file, *content, **options)

    monkeypatch.setattr(index_module, "write_content", write)
    cache = folder.parent / "cache"
    cache.mkdir()
    (cache / "locked").touch()
    return cache


def info_in(cache: Path, folder: Path) -> ImageInfo:
    index = ImageIndex(cache / "index.json", copy=folder.parent / "run" / "index.json")
    result = index.info(found(folder))
    index.save()
    return result


def test_where_the_cache_cannot_be_written_a_copy_is_kept(
    folder: Path, locked: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    copy = folder.parent / "run" / "index.json"
    with caplog.at_level(logging.INFO):
        first = info_in(locked, folder)
        assert str(copy) in caplog.text
        caplog.clear()
        assert info_in(locked, folder) == first
        assert str(copy) in caplog.text
    assert read == ["a.bmp"]
    assert copy.exists()
    assert not (locked / "index.json").exists()


def test_the_copy_goes_once_the_cache_is_written_again(folder: Path, locked: Path, read: list[str]) -> None:
    info_in(locked, folder)
    (locked / "locked").unlink()
    (folder / "a.bmp").write_bytes(bmp("blue"))
    changed = info_in(locked, folder)
    assert not (folder.parent / "run" / "index.json").exists()
    read.clear()
    assert ImageIndex(locked / "index.json").info(found(folder)) == changed
    assert read == []


def test_a_whole_index_in_a_cache_that_cannot_be_written_needs_no_copy(
    folder: Path, locked: Path, read: list[str]
) -> None:
    (locked / "locked").unlink()
    info_in(locked, folder)
    (locked / "locked").touch()
    read.clear()
    info_in(locked, folder)
    assert read == []
    assert not (folder.parent / "run").exists()


def test_a_damaged_copy_leaves_the_index_of_the_cache(folder: Path, locked: Path, read: list[str]) -> None:
    (locked / "locked").unlink()
    info_in(locked, folder)
    (folder.parent / "run").mkdir()
    (folder.parent / "run" / "index.json").write_bytes(b"{}")
    read.clear()
    info_in(locked, folder)
    assert read == []


def test_without_a_place_for_a_copy_the_run_ends(folder: Path, locked: Path, inspected: list[bytes]) -> None:
    index = ImageIndex(locked / "index.json")
    index.info(found(folder))
    with pytest.raises(StorageError, match="no permission"):
        index.save()

"""Files and folders appear complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.helpers.io import atomic
from simpletuner.helpers.io.atomic import (
    link_or_copy,
    publish_folder,
    remove_leftovers,
    verify_manifest,
    write_bytes,
    write_json,
    write_text,
)
from simpletuner.helpers.io.faults import StorageError, at_crash_points

CRASH_POINTS = re.findall(r'crash_point\("([a-z_.]+)"\)', Path(atomic.__file__).read_text(encoding="utf-8"))
FILE_POINTS = sorted({name for name in CRASH_POINTS if name.startswith("file.")})
# Publishing also writes its manifest as a new file.
FOLDER_POINTS = sorted(set(CRASH_POINTS) - {"file.before_rename", "file.after_rename"})

# Dies as by kill -9: nothing is cleaned up, no finally runs.
DYING_WRITER = """
import os, sys
from pathlib import Path
from simpletuner.helpers.io.atomic import publish_folder, write_bytes
from simpletuner.helpers.io.faults import at_crash_points

point, kind, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
with at_crash_points(lambda name: os._exit(9) if name == point else None):
    if kind == "file":
        write_bytes(target, b"new")
    else:
        with publish_folder(target) as folder:
            (folder / "weights").write_bytes(b"new")
"""


def dies_at(point: str, kind: str, target: Path) -> None:
    command = [sys.executable, "-c", DYING_WRITER, point, kind, str(target)]
    finished = subprocess.run(command, check=False, cwd=Path(__file__).parents[3])
    assert finished.returncode == 9, f"{point} was not passed"


def publish(target: Path, content: bytes) -> None:
    with publish_folder(target) as folder:
        (folder / "weights").write_bytes(content)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "state.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("durable", [True, False])
def test_write_bytes_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "new" / "file"
    write_bytes(file, b"old", durable=durable)
    write_bytes(file, b"new", durable=durable)
    assert file.read_bytes() == b"new"
    assert [each.name for each in file.parent.iterdir()] == ["file"]


def _note_syncs_and_renames(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """("sync" or "rename", inode) in the order in which they happen."""
    events: list[tuple[str, int]] = []
    sync, rename = os.fsync, Path.rename
    replace = Path.replace

    def noted_sync(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append(("rename", path.stat().st_ino))
        return replace(path, target)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.stat().st_ino))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return events


@pytest.mark.reliability_row(2)
def test_a_file_is_on_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _note_syncs_and_renames(monkeypatch)
    write_bytes(tmp_path / "a", b"1")
    file, folder = (tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino
    assert events == [("sync", file), ("rename", file), ("sync", folder)]


@pytest.mark.reliability_row(2)
def test_every_file_of_a_folder_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _note_syncs_and_renames(monkeypatch)
    with publish_folder(tmp_path / "made") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_bytes(b"1")
        (partial / "b").write_bytes(b"2")
    made = tmp_path / "made"
    renamed = events.index(("rename", made.stat().st_ino))
    before = {inode for kind, inode in events[:renamed] if kind == "sync"}
    everything = [made, *made.rglob("*")]
    assert len(everything) == 5, "folder, subfolder, two files and the manifest"
    assert {path.stat().st_ino for path in everything} <= before
    assert ("sync", tmp_path.stat().st_ino) in events[renamed:]


@pytest.mark.reliability_row(2)
def test_a_replaced_folder_stays_until_the_new_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "made", b"old")
    removed_at: list[int] = []
    remove = shutil.rmtree

    def noted_remove(path: Path, **keywords: bool) -> None:
        removed_at.append(len(events))
        remove(path, **keywords)

    monkeypatch.setattr(shutil, "rmtree", noted_remove)
    events = _note_syncs_and_renames(monkeypatch)
    publish(tmp_path / "made", b"new")
    renamed = events.index(("rename", (tmp_path / "made").stat().st_ino))
    (before_removal,) = removed_at
    assert ("sync", tmp_path.stat().st_ino) in events[renamed:before_removal]


@pytest.mark.reliability_row(2)
def test_the_name_of_a_folder_that_is_put_back_is_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "made", b"old")
    (tmp_path / "made").rename(tmp_path / ".replaced_00000000_made")
    events = _note_syncs_and_renames(monkeypatch)
    remove_leftovers(tmp_path)
    assert events == [("rename", (tmp_path / "made").stat().st_ino), ("sync", tmp_path.stat().st_ino)]


def test_write_bytes_honours_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_write_json_keeps_every_name_readable_back(tmp_path: Path) -> None:
    names = ["plain", "emoji 🐈", "a\u0301", "\u202eright", "-dash", "new\nline", os.fsdecode(b"\xff\xfe")]
    write_json(tmp_path / "names.json", names)
    assert json.loads((tmp_path / "names.json").read_bytes()) == names


def test_write_json_refuses_a_number_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "numbers.json", {"loss": float("nan")})
    assert not (tmp_path / "numbers.json").exists()


def test_write_text_writes_undecodable_bytes_as_escapes(tmp_path: Path) -> None:
    write_text(tmp_path / "text", os.fsdecode(b"a\xff"))
    assert (tmp_path / "text").read_bytes() == rb"a\udcff"


def fails_with(number: int, point: str) -> object:
    def fail(name: str) -> None:
        if name == point:
            raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"full: \d+ bytes free, 3 bytes needed"),
        (errno.EDQUOT, r"full: \d+ bytes free, 3 bytes needed"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("point", ["file.created", "file.written", "file.before_rename"])
@pytest.mark.reliability_row(5)
def test_a_failed_write_says_why_and_keeps_the_old_file(
    tmp_path: Path, number: int, message: str, point: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with at_crash_points(fails_with(number, point)), pytest.raises(StorageError, match=message):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.reliability_row(5)
def test_a_full_disk_during_publishing_keeps_the_old_folder(tmp_path: Path) -> None:
    publish(tmp_path / "checkpoint", b"old")
    full = fails_with(errno.ENOSPC, "folder.before_manifest")
    with at_crash_points(full), pytest.raises(StorageError, match="full"):
        publish(tmp_path / "checkpoint", b"new")
    assert (tmp_path / "checkpoint" / "weights").read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.reliability_row(26)
def test_writing_below_a_file_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/inside"):
        write_bytes(tmp_path / "file" / "inside", b"")


@pytest.mark.parametrize("point", FILE_POINTS)
@pytest.mark.reliability_row(2)
def test_a_file_is_old_or_new_whenever_its_writer_dies(tmp_path: Path, point: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    dies_at(point, "file", file)
    assert file.read_bytes() == (b"new" if point == "file.after_rename" else b"old")
    remove_leftovers(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("point", "replaces"),
    [(point, True) for point in FOLDER_POINTS]
    + [(point, False) for point in FOLDER_POINTS if point != "folder.moved_aside"],
)
@pytest.mark.reliability_row(2)
def test_a_folder_verifies_whenever_its_writer_dies(tmp_path: Path, point: str, replaces: bool) -> None:
    folder = tmp_path / "checkpoint"
    if replaces:
        publish(folder, b"old")
    dies_at(point, "folder", folder)
    remove_leftovers(tmp_path)
    expected = b"new" if point == "folder.after_rename" else b"old" if replaces else None
    assert [each.name for each in tmp_path.iterdir()] == (["checkpoint"] if expected else [])
    if expected:
        assert verify_manifest(folder) == []
        assert (folder / "weights").read_bytes() == expected


def test_publish_folder_leaves_nothing_when_its_body_raises(tmp_path: Path) -> None:
    def stop(name: str) -> None:
        raise KeyError(name)

    with at_crash_points(stop), pytest.raises(KeyError, match=r"folder\.filled"):
        publish(tmp_path / "checkpoint", b"half")
    assert list(tmp_path.iterdir()) == []


def test_published_folder_verifies_and_lists_every_file(tmp_path: Path) -> None:
    publish(tmp_path / "checkpoint", b"content")
    assert verify_manifest(tmp_path / "checkpoint") == []
    manifest = json.loads((tmp_path / "checkpoint" / "manifest.json").read_bytes())
    assert sorted(manifest["files"]) == ["deeper/state.json", "weights"]
    assert manifest["files"]["weights"]["size"] == 7


def damage_by_flip(folder: Path) -> None:
    (folder / "weights").write_bytes(b"cOntent")


def damage_by_cut(folder: Path) -> None:
    (folder / "weights").write_bytes(b"con")


def damage_by_removal(folder: Path) -> None:
    (folder / "deeper" / "state.json").unlink()


def damage_by_link(folder: Path) -> None:
    (folder / "weights").rename(folder.parent / "outside")
    (folder / "weights").symlink_to(folder.parent / "outside")


def damage_manifest_text(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[1, 2")


def damage_manifest_shape(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[]")


def damage_manifest_missing(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest_escape(folder: Path) -> None:
    entry = {"size": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps({"files": {"../outside": entry}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_by_flip, "weights does not match"),
        (damage_by_cut, "weights has 3 bytes instead of 7"),
        (damage_by_removal, "deeper/state.json is missing"),
        (damage_by_link, "weights is missing"),
        (damage_manifest_text, "damaged"),
        (damage_manifest_shape, "damaged"),
        (damage_manifest_missing, "cannot be read"),
        (damage_manifest_escape, "not a name inside"),
    ],
)
@pytest.mark.reliability_row(6)
def test_verify_manifest_names_the_damage(tmp_path: Path, damage: object, problem: str) -> None:
    publish(tmp_path / "checkpoint", b"content")
    assert callable(damage)
    damage(tmp_path / "checkpoint")
    found = verify_manifest(tmp_path / "checkpoint")
    assert len(found) == 1
    assert problem in found[0]


def test_remove_leftovers_keeps_those_of_living_writers_and_of_other_hosts(tmp_path: Path) -> None:
    own = tmp_path / f".partial_{atomic._HOST}_{os.getpid()}_00000000"
    parent = tmp_path / f".partial_{atomic._HOST}_{os.getppid()}_00000000"
    other = tmp_path / ".partial_elsewhere_1_00000000"
    for file in (own, parent, other, tmp_path / ".hidden", tmp_path / "file"):
        file.write_bytes(b"")
    assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path, of_other_hosts=True) == [other.name]
    assert len(list(tmp_path.iterdir())) == 4


def test_remove_leftovers_of_a_missing_folder_finds_nothing(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "none") == []


def test_files_and_folders_are_written_where_a_folder_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def open_file(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is None and Path(path).is_dir() and not Path(path).name.startswith(".replaced"):
            raise PermissionError(errno.EACCES, "a folder cannot be opened", path)
        return opened(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", open_file)
    write_bytes(tmp_path / "file", b"one\ntwo\r\n\x1a")
    publish(tmp_path / "folder", b"new")
    publish(tmp_path / "folder", b"newer")
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\r\n\x1a"
    assert verify_manifest(tmp_path / "folder") == []
    assert (tmp_path / "folder" / "weights").read_bytes() == b"newer"


def test_each_file_of_a_folder_is_flushed_through_a_writable_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_writable = []
    flush = os.fsync

    def note(descriptor: int) -> None:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        is_writable.append(access != os.O_RDONLY or stat.S_ISDIR(os.fstat(descriptor).st_mode))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    publish(tmp_path / "folder", b"new")
    assert len(is_writable) > 3
    assert all(is_writable)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_linked_or_copied_file_stays_when_the_other_goes(
    tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"first")
    link_or_copy(source, target)
    link_or_copy(source, target)
    assert (source.stat().st_ino == target.stat().st_ino) == has_links
    write_bytes(source, b"second")
    assert target.read_bytes() == b"first"
    link_or_copy(source, target)
    source.unlink()
    assert target.read_bytes() == b"second"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    with pytest.raises(StorageError):
        link_or_copy(source, target)
    assert target.read_bytes() == b"second"

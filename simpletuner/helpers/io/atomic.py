"""Atomic writes: a file or folder appears complete or not at all.

Each is written under a hidden temporary name in the same folder, flushed to disk (fsync) and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simpletuner.helpers.io.faults import check_space, crash_point, storage_error
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.process import is_running
from simpletuner.helpers.io.run_folder import CHECKPOINT_MANIFEST_FILE

_HOST = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40] or "host"
_PARTIAL = re.compile(r"^\.partial_(?P<host>[A-Za-z0-9-]+)_(?P<pid>\d+)_[0-9a-f]{8}$")
_REPLACED = re.compile(r"^\.replaced_[0-9a-f]{8}_(?P<name>.+)$")

Json = Mapping[str, "JsonValue"]
JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file by these bytes; a reader sees the old content or the new, never a part.

    durable=False skips fsync: after a power cut the file may hold garbage, so its reader must check it.

    Raises:
        StorageError: The file cannot be written. The old content is unchanged.
    """
    write_chunks(path, [data], durable=durable)


def write_chunks(path: Path, chunks: Sequence[bytes | memoryview], *, durable: bool = True) -> None:
    """The same with the bytes in pieces, which need no memory of their own as a whole.

    Raises:
        StorageError: The file cannot be written. The old content is unchanged.
    """
    partial = path.parent / _partial_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_new(partial, chunks, durable=durable)
            crash_point("file.before_rename")
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        crash_point("file.after_rename")
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error, needed=sum(map(len, chunks))) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text as UTF-8; undecodable bytes of file names become escapes.

    Raises:
        StorageError: The file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, data: Json | Sequence[JsonValue]) -> None:
    """Replace a file by this value as indented JSON.

    Raises:
        StorageError: The file cannot be written.
        ValueError: A number is not finite.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def link_or_copy(source: Path, target: Path) -> None:
    """Replace a file by another's content, which stays when the other one is replaced or removed.

    A hard link where the file system has them, else a copy.

    Raises:
        StorageError: The file cannot be written, or the other one not read.
    """
    partial = target.parent / _partial_name()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)  # a link to the file that target is already stays beside it
    except OSError as error:
        raise storage_error(target, error) from error


@contextmanager
def publish_folder(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder; on exit it becomes `path`, complete and with a manifest.

    It replaces an existing folder. When the body raises, `path` is unchanged. `needed` is the number of
    bytes that the body writes, if the caller knows it.

    Raises:
        StorageError: The folder cannot be written.
    """
    partial = path.parent / _partial_name()
    if needed is not None:
        check_space(path, needed=needed)
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            crash_point("folder.filled")
            _seal(partial)
            crash_point("folder.before_rename")
            _move_into_place(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        crash_point("folder.after_rename")
    except OSError as error:
        raise storage_error(path, error, needed=needed) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on exit it becomes `path`, complete. When the body raises, nothing is left.

    Raises:
        StorageError: Something has the name, or the folder cannot be written.
    """
    partial = path.parent / _partial_name()
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "exists already")
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise storage_error(path, error) from error


def verify_manifest(folder: Path) -> list[str]:
    """One sentence for each damage of a published folder; empty when every file is intact."""
    manifest = folder / CHECKPOINT_MANIFEST_FILE
    try:
        return damaged_files(folder, json.loads(manifest.read_bytes())["files"])
    except OSError as error:
        return [f"{CHECKPOINT_MANIFEST_FILE} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{CHECKPOINT_MANIFEST_FILE} is damaged"]


def file_entry(path: Path) -> dict[str, JsonValue]:
    """Size and hash of a file, for `damaged_files`."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def damaged_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each file that is missing or differs from its `file_entry`; name -> entry.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The entries have another form.
    """
    files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    checks = (
        _file_problem(folder, name, size=size, digest=digest)
        for name, (size, digest) in sorted(files.items())
    )
    return [problem for problem in checks if problem is not None]


def remove_leftovers(folder: Path, *, of_other_hosts: bool = False) -> list[str]:
    """Remove temporary files of dead processes, and restore a folder whose replacement was interrupted.

    Temporary files of running processes stay. Those of other hosts stay unless of_other_hosts is set, which
    the holder of the folder's run lock may do. Returns the removed or restored names.
    """
    handled = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        partial, replaced = _PARTIAL.match(entry.name), _REPLACED.match(entry.name)
        if partial and _is_abandoned(partial["host"], int(partial["pid"]), of_other_hosts=of_other_hosts):
            _remove(entry)
            handled.append(entry.name)
        elif replaced:
            _settle_replacement(entry, folder / replaced["name"])
            handled.append(entry.name)
    return handled


def _partial_name() -> str:
    return f".partial_{_HOST}_{os.getpid()}_{uuid.uuid4().hex[:8]}"


def _write_new(path: Path, chunks: Sequence[bytes | memoryview], *, durable: bool) -> None:
    with path.open("xb") as file:
        crash_point("file.created")
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        crash_point("file.written")
        if durable:
            os.fsync(file.fileno())


def _seal(folder: Path) -> None:
    """Flush every file to disk, then write the manifest, last."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries: dict[str, JsonValue] = {}
    for file in files:
        assert not file.is_symlink(), f"{file} is a link; a published folder holds its own files"
        _sync_file(file)
        entries[file.relative_to(folder).as_posix()] = file_entry(file)
    for subfolder in sorted(sub for sub in folder.rglob("*") if sub.is_dir()):
        _sync_folder(subfolder)
    crash_point("folder.before_manifest")
    manifest = json.dumps({"version": 1, "files": entries}, indent=2) + "\n"
    _write_new(folder / CHECKPOINT_MANIFEST_FILE, [manifest.encode()], durable=True)
    _sync_folder(folder)


def _move_into_place(partial: Path, path: Path) -> None:
    if path.exists():
        aside = path.parent / f".replaced_{uuid.uuid4().hex[:8]}_{path.name}"
        path.rename(aside)
        crash_point("folder.moved_aside")
        partial.rename(path)
        _sync_folder(path.parent)
        shutil.rmtree(aside)
    else:
        partial.rename(path)
    _sync_folder(path.parent)


def _settle_replacement(aside: Path, path: Path) -> None:
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(path)
        _sync_folder(path.parent)


def _file_problem(folder: Path, name: str, *, size: int, digest: str) -> str | None:
    shown = printable(name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{shown} is not a name inside the folder"
    file = folder / name
    if file.is_symlink() or not file.is_file():
        return f"{shown} is missing"
    try:
        found = file.stat().st_size
        if found != size:
            return f"{shown} has {found} bytes instead of {size}"
        return None if _sha256(file) == digest else f"{shown} does not match its checksum"
    except OSError as error:
        return f"{shown} cannot be read: {error.strerror}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_abandoned(host: str, pid: int, *, of_other_hosts: bool) -> bool:
    if host != _HOST:
        return of_other_hosts
    return not is_running(pid)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes no file that is open for reading only
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    try:
        from os import O_DIRECTORY
    except ImportError:  # Windows, where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY | O_DIRECTORY)
    try:
        # Some network file systems cannot fsync a folder and return EINVAL; then the rename must do.
        with _suppress_errno(errno.EINVAL):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _suppress_errno(number: int) -> Iterator[None]:
    """Ignore the OSError with this number and no other."""
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise

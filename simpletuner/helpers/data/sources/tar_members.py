"""The members of a tar archive, found by its headers; nothing is unpacked."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simpletuner.helpers.data.sources.base import FoundFile, RangedSource
from simpletuner.helpers.errors import DataError

# No header of a real archive is longer, and a damaged one may claim any length.
_MAX_HEADER_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
# What tarfile raises at the headers of damaged and hostile archives, beside its own errors.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass
class Members:
    """The regular files of an archive, hidden ones left out."""

    names: list[str] = field(default_factory=list)
    """As when the archive is unpacked: of two members of one name the later one counts."""
    offsets: list[int] = field(default_factory=list)
    """Where the bytes of each start."""
    sizes: list[int] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)
    """[name, reason] of the members that cannot be used."""
    problem: str = ""
    """What is wrong with the archive's end; empty if it is whole."""


def read_members(archive: FoundFile, source: RangedSource[Any]) -> Members:
    """The members of an archive.

    A member counts if all of its bytes are there, in an archive that is cut off too.

    Raises:
        DataError: It is no tar archive, is compressed, or cannot be read; the message does not name it.
    """
    found: dict[str, tuple[int, int]] = {}
    members = Members()
    with source.ranges(archive) as read:
        opened = _Headers(read, source.request_bytes)
        try:
            members.problem = _read_into(found, members.skipped, _Archive(opened))
        except _DAMAGE as error:
            raise DataError(_no_archive(opened)) from error
    members.names = list(found)
    members.offsets = [offset for offset, _ in found.values()]
    members.sizes = [size for _, size in found.values()]
    return members


def _read_into(found: dict[str, tuple[int, int]], skipped: list[list[str]], archive: _Archive) -> str:
    """Note every member; returns what is wrong with the archive's end."""
    member, problem = archive.member(after=0)
    if problem:
        raise tarfile.ReadError(problem)
    while member is not None:
        following, problem = archive.member(after=archive.offset)
        name, reason = _usable_name(member)
        if problem and not archive.holds(member.offset_data + member.size):
            reason = reason or "its archive is cut off in it"
        if reason:
            skipped.append([name, reason])
        elif name and not member.isdir():
            found[name] = (member.offset_data, member.size)
        if problem:
            return problem
        member = following
    return archive.problem_at_end()


def _usable_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """The name of a member as in a folder, empty for a hidden one, and the reason if it cannot be used."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return member.name, "its name is no path within the archive"
    if any(part.startswith(".") for part in parts):
        return "", ""
    name = "/".join(parts)
    if member.issym() or member.islnk():
        return name, "it is a link; pack the file itself"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return name, "it is not a regular file"
    return name, ""


def _no_archive(opened: _Headers) -> str:
    opened.seek(0)
    start = opened.read(8)
    if not start:
        return "it is empty; get it again"
    for magic, title in _COMPRESSED.items():
        if start.startswith(magic):
            return f"it is compressed with {title}, so its images cannot be read alone; decompress it"
    return "it is no tar archive; get it again, or remove it"


class _Archive(tarfile.TarFile):
    """An archive of which one member after the other is read, and none is kept."""

    def __init__(self, opened: _Headers) -> None:
        super().__init__(fileobj=opened, encoding="utf-8")
        self._opened = opened

    def member(self, *, after: int) -> tuple[tarfile.TarInfo | None, str]:
        """The member whose header starts there, or what is wrong with it or with the member before."""
        self.members: list[tarfile.TarInfo] = []
        try:
            member = self.next()
        except _DAMAGE as error:
            return None, f"it is cut off or damaged: {error}"
        if member is not None and member.size < 0:
            return None, f"it is damaged at byte {after:,}"
        return member, ""

    def holds(self, end: int) -> bool:
        """Whether the archive has so many bytes."""
        self._opened.seek(max(0, end - 1))
        return end == 0 or bool(self._opened.read(1))

    def problem_at_end(self) -> str:
        """What is wrong behind the last member."""
        self._opened.seek(self.offset)
        block = self._opened.read(_BLOCK)
        if not block:
            return "it has no end mark: it may be cut off"
        if block.strip(b"\0"):
            return f"it is cut off or damaged at byte {self.offset:,}"
        if self._opened.read(2 * tarfile.RECORDSIZE).strip(b"\0"):
            return "it goes on behind its end mark, as joined archives do; that part is not read"
        return ""


class _Headers(io.BufferedReader):
    """The file that tarfile reads: an archive, of which a damaged header may ask for any part."""

    def __init__(self, read: Callable[[int, int], bytes], request_bytes: int) -> None:
        super().__init__(_Ranges(read), request_bytes)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Ranges(io.RawIOBase):
    """An archive as a file that can be sought, read by ranges."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read, self._position = read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        assert whence in (io.SEEK_SET, io.SEEK_CUR), "the length of the archive is not asked for"
        self._position = position + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

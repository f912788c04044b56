"""Remembers the inspected images of a folder, so unchanged files are neither read nor decoded again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg
import xxhash

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.columns import Rows, Texts, is_everything
from simpletuner.helpers.data.images import inspect_image, is_read_anew
from simpletuner.helpers.data.index_file import (
    IndexContent,
    KnownFiles,
    empty_content,
    is_same,
    read_content,
    write_content,
)
from simpletuner.helpers.data.optional_formats import optional_formats
from simpletuner.helpers.data.sources.base import (
    MAX_FILE_BYTES,
    Files,
    FoundFile,
    by_folder,
    expect,
    packed_signature,
    read_bounded,
)
from simpletuner.helpers.errors import DamagedImageError, DataError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.names import file_name, printable
from simpletuner.helpers.io.redaction import redacted

logger = logging.getLogger(__name__)

# Other decoders or other rules may judge an image differently.
_VERSION = " ".join(["3", PIL.__version__, simplejpeg.__version__, *optional_formats()])
# In the keys of images from which earlier versions read other pixels; those of all others stay valid.
_READ_ANEW = "colours 2"
# A file that changed this shortly before it was read may change again within one tick of its times.
_RACY_NS = 2_000_000_000
FORGOTTEN = "it is not the image that an earlier start read any more, so the next start reads it anew"
"""Begins the reason of such an image."""
_UNREAD = "0" * 32
_WHOLE = np.dtype("S16")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The result of inspecting an image file."""

    digest: str
    """Of the file's bytes; empty if they cannot be read."""
    size: Size | None
    """EXIF orientation applied; None if the file or its header cannot be used."""
    problem: str | None
    """The reason if it cannot be used; with a size, the pixels were found damaged when they were decoded."""
    is_read_anew: bool = False
    """Whether earlier versions read other pixels from it."""

    @property
    def content(self) -> str:
        """Identity of its pixels, for the keys of cached latents."""
        return content_of(self.digest, is_read_anew=self.is_read_anew)


@dataclass(frozen=True, slots=True)
class Infos:
    """The results of inspecting several images, as columns."""

    digests: npt.NDArray[np.uint8]
    """[n, 16], of the files' bytes; zeros if they cannot be read."""
    sizes: npt.NDArray[np.int32]
    """[n, 2]: height and width, EXIF orientation applied; 0 if the file or its header cannot be used."""
    is_read_anew: npt.NDArray[np.bool_]
    """Whether earlier versions read other pixels from each."""
    problems: dict[int, str]
    """Position -> the reason if it cannot be used; with a size, the pixels were found damaged."""

    def take(self, rows: Rows) -> Infos:
        """The results of some of them."""
        if is_everything(rows, len(self.sizes)):
            return self
        problems = {new: self.problems[row] for new, row in enumerate(rows.tolist()) if row in self.problems}
        return Infos(
            self.digests[rows], self.sizes[rows], self.is_read_anew[rows], problems if self.problems else {}
        )

    def at(self, row: int) -> ImageInfo:
        """The result of one of them."""
        height, width = self.sizes[row].tolist()
        digest = self.digests[row].tobytes().hex()
        return ImageInfo(
            digest=digest if digest != _UNREAD else "",
            size=Size(height=height, width=width) if height else None,
            problem=self.problems.get(row),
            is_read_anew=bool(self.is_read_anew[row]),
        )


def joined_infos(parts: Sequence[Infos]) -> Infos:
    """The results of several inspections as one."""
    starts = np.cumsum([0, *(len(each.sizes) for each in parts)]).tolist()
    return Infos(
        np.concatenate([each.digests for each in parts]),
        np.concatenate([each.sizes for each in parts]),
        np.concatenate([each.is_read_anew for each in parts]),
        {
            start + row: why
            for start, each in zip(starts, parts, strict=False)
            for row, why in each.problems.items()
        },
    )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the bytes of an image gave."""

    size: tuple[int, int, int]
    """Height, width, 1 if it is read anew; height 0 if the header cannot be used."""
    problem: str | None
    """The reason if the header cannot be used."""


def content_digest(data: bytes) -> str:
    """128 bits over the bytes of a file, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def content_of(digest: str, *, is_read_anew: bool) -> str:
    """Identity of an image's pixels, for the keys of cached latents."""
    return f"{digest} {_READ_ANEW}" if is_read_anew else digest


def index_file(latents_folder: Path, entry: DatasetConfig | ConditioningConfig | ReferenceConfig) -> Path:
    """The index of a dataset, or of an entry that conditions it, in the folder of its latents."""
    return latents_folder / f"images_{file_name(entry.id)}.safetensors"


def read_unchanged(file: FoundFile, digest: str) -> bytes:
    """The bytes of a file that had this digest in the scan.

    Raises:
        DamagedImageError: The same of a file whose signature does not tell it; `mark_damaged` forgets it.
        DataError: The file changed or vanished since then.
    """
    try:
        data = read_bounded(file, limit=MAX_FILE_BYTES)
        if content_digest(data) != digest:
            raise DataError("it changed after the scan")
    except DataError as error:
        if not file.source.shows_changes(file):
            raise DamagedImageError(f"{FORGOTTEN}: {error}") from error
        raise DataError(f"{file.place}: {error}. Start the run again.") from error
    return data


class ImageIndex:
    """The ImageInfo of every image of a source and the text of its caption files, stored in one file.

    A file is read again if its signature changed. Known bytes are not decoded again. After `save` the index
    holds nothing in memory until it is used again.

    Args:
        file: In the folder of the latents.
        copy: Written where that folder cannot be, and read in place of the file from then on.
        is_read_only: Nothing is written, in this folder or in another.
    """

    def __init__(self, file: Path, *, copy: Path | None = None, is_read_only: bool = False) -> None:
        self._file, self._copy, self.is_read_only = file, copy, is_read_only
        self._forget()

    @property
    def folder(self) -> Path:
        """The folder of the latents, in which its file lies."""
        return self._file.parent

    def info(self, image: FoundFile) -> ImageInfo:
        """Look an image up, or read and inspect it."""
        row = self._row(image)
        if row >= 0:
            self._kept[row] = True
            return self._info_of(self._known.digests[row].tobytes(), self._verdict_at(row))
        started_ns = time.time_ns()
        try:
            data = read_bounded(image, limit=MAX_FILE_BYTES)
        except DataError as error:
            return ImageInfo(digest="", size=None, problem=str(error))
        digest = xxhash.xxh3_128_digest(data)
        if _is_settled(image, started_ns):
            self._read[image.name] = packed_signature(image.signature), digest
        if digest not in self._verdicts:
            known = self._contents.get(digest)
            self._verdicts[digest] = _inspected(data) if known is None else self._verdict_at(known)
        return self._info_of(digest, self._verdicts[digest])

    def infos(self, images: Files) -> Infos:
        """Look images up; read and inspect those that are not known."""
        rows = self._known.images.rows(images.names, images.packed)
        is_known = rows >= 0
        rows = rows[is_known]
        self._kept[rows] = True
        found = Infos(
            digests=np.zeros((len(images), 16), np.uint8),
            sizes=np.zeros((len(images), 2), np.int32),
            is_read_anew=np.zeros(len(images), bool),
            problems={},
        )
        found.digests[is_known] = self._known.digests[rows]
        found.sizes[is_known] = self._known.sizes[rows, :2]
        found.is_read_anew[is_known] = self._known.sizes[rows, 2] != 0
        if not is_known.all():
            expect(images[row] for row in np.flatnonzero(~is_known).tolist())
        doubtful = ~is_known | (found.sizes[:, 0] == 0)
        if self._known.damaged:
            doubtful |= rows_of(found.digests, self._known.damaged)
        for row in np.flatnonzero(doubtful).tolist():
            info = self.info(images[row])
            if info.digest:
                found.digests[row] = np.frombuffer(bytes.fromhex(info.digest), np.uint8)
            if info.size is not None:
                found.sizes[row] = info.size.height, info.size.width
            found.is_read_anew[row] = info.is_read_anew
            if info.problem is not None:
                found.problems[row] = info.problem
        return found

    def knows(self, image: FoundFile) -> bool:
        """Whether an image is looked up without reading it."""
        return self._row(image) >= 0

    def texts(self, files: Files, read: Callable[[FoundFile], str]) -> list[str | DataError]:
        """The text of each of these caption files, or why it cannot be read; those not known are read.

        Args:
            files: The files.
            read: Gives the text of a file, without a NUL, or raises DataError.
        """
        rows = self._known.texts.rows(files.names, files.packed)
        is_known = rows >= 0
        self._kept_texts[rows[is_known]] = True
        if is_everything(rows, len(self._known.bodies)):
            return list(self._known.bodies)
        expect(files[place] for place in np.flatnonzero(~is_known).tolist())
        return [
            self._known.bodies[row] if row >= 0 else self._text_of(files[place], read)
            for place, row in enumerate(rows.tolist())
        ]

    def expect(self, images: Iterable[FoundFile]) -> None:
        """Tell the source of images which of them will be read, as they are unknown."""
        expect(image for image in images if not self.knows(image))

    def mark_damaged(self, damaged: Mapping[str, str]) -> None:
        """Remember which of the images that the file holds have damaged pixels; digest -> reason.

        Those that only proved to be other images than those of the scan are dropped, so that the next start
        reads them anew.
        """
        forgotten = [digest for digest, why in damaged.items() if FORGOTTEN in why]
        known = rows_of(self._known.digests, damaged.keys() - set(forgotten))
        held = {digest.tobytes().hex() for digest in self._known.digests[known]}
        self._damaged.update({digest: why for digest, why in damaged.items() if digest in held})
        self._kept[:], self._kept_texts[:] = ~rows_of(self._known.digests, forgotten), True

    def save(self) -> None:
        """Write the entries of the files looked up since the index was opened; the others are dropped.

        Raises:
            StorageError: The file cannot be written, nor its copy.
        """
        assert not self.is_read_only, f"{self._file} is only read"
        is_changed = not (self._kept.all() and self._kept_texts.all())
        if is_changed or self._verdicts or self._read_texts or self._damaged:
            content = self._current()
            if not is_same(content, self._known):
                self._write(content)
        self._forget()

    def _write(self, content: IndexContent) -> None:
        try:
            write_content(self._file, content, version=_VERSION)
        except StorageError as error:
            if self._copy is None:
                raise
            write_content(self._copy, content, version=_VERSION)
            logger.info("The image index is kept as %s. %s", printable(str(self._copy)), error)
        else:
            if self._copy is not None:
                self._copy.unlink(missing_ok=True)

    def _forget(self) -> None:
        for name in ("_known", "_contents", "_kept", "_kept_texts"):
            self.__dict__.pop(name, None)
        self._read: dict[str, tuple[bytes, bytes]] = {}
        """Name -> packed signature and digest of the images read."""
        self._read_texts: dict[str, tuple[bytes, str]] = {}
        """Name -> packed signature and text of the caption files read."""
        self._verdicts: dict[bytes, _Verdict] = {}
        """By the digests of the images read."""
        self._damaged: dict[str, str] = {}
        """Digest -> the reason, where that is new."""

    @cached_property
    def _known(self) -> IndexContent:
        """The stored content; that of no file if the index is missing, damaged or of another version."""
        if self._copy is not None and self._copy.exists():
            logger.info("The image index is read from its copy %s.", printable(str(self._copy)))
            if (found := _read(self._copy)) is not None:
                return found
        return _read(self._file) or empty_content()

    @cached_property
    def _kept(self) -> npt.NDArray[np.bool_]:
        """Whether each known image was looked up."""
        return np.zeros(len(self._known.digests), bool)

    @cached_property
    def _kept_texts(self) -> npt.NDArray[np.bool_]:
        """Whether each known caption file was looked up."""
        return np.zeros(len(self._known.bodies), bool)

    @cached_property
    def _contents(self) -> dict[bytes, int]:
        """Digest -> position of an image with these bytes."""
        return {digest.tobytes(): row for row, digest in enumerate(self._known.digests)}

    def _row(self, image: FoundFile) -> int:
        return self._known.images.row(image.name, packed_signature(image.signature))

    def _verdict_at(self, row: int) -> _Verdict:
        known, (height, width, anew) = self._known, self._known.sizes[row].tolist()
        problem = None if height else known.problems[known.digests[row].tobytes().hex()]
        return _Verdict((height, width, anew), problem)

    def _info_of(self, digest: bytes, verdict: _Verdict) -> ImageInfo:
        height, width, anew = verdict.size
        return ImageInfo(
            digest=digest.hex(),
            size=Size(height=height, width=width) if height else None,
            problem=verdict.problem if not height else self._known.damaged.get(digest.hex()),
            is_read_anew=bool(anew),
        )

    def _text_of(self, file: FoundFile, read: Callable[[FoundFile], str]) -> str | DataError:
        started_ns = time.time_ns()
        try:
            text = read(file)
        except DataError as error:
            return error
        # A caption that holds a secret is not written into one more file.
        if _is_settled(file, started_ns) and redacted(text) == text:
            self._read_texts[file.name] = packed_signature(file.signature), text
        return text

    def _current(self) -> IndexContent:
        """The content of the files looked up, in the order of their names."""
        known, images, texts = self._known, np.flatnonzero(self._kept), np.flatnonzero(self._kept_texts)
        # A file that changed a moment ago stands there without its name, so that it is not decoded again.
        nameless = self._verdicts.keys() - {digest for _, digest in self._read.values()}
        named = [(name, *entry) for name, entry in self._read.items()]
        added = [*named, *(("", bytes(32), digest) for digest in sorted(nameless))]
        digests = np.concatenate([known.digests[images], _matrix((each[2] for each in added), np.uint8, 16)])
        new_sizes = [self._verdicts[digest].size for *_, digest in added]
        sizes = np.concatenate([known.sizes[images], np.array(new_sizes, np.int32).reshape(-1, 3)])
        image_order, image_files = _sorted_files(known.images, images, [each[:2] for each in added])
        text_order, text_files = _sorted_files(
            known.texts, texts, [(name, packed) for name, (packed, _) in self._read_texts.items()]
        )
        bodies = [known.bodies[row] for row in texts.tolist()]
        bodies += [text for _, text in self._read_texts.values()]
        problems = {digest.hex(): each.problem for digest, each in self._verdicts.items() if each.problem}
        held = digests[image_order]
        return IndexContent(
            images=image_files,
            digests=held,
            sizes=sizes[image_order],
            texts=text_files,
            bodies=Texts.of([bodies[row] for row in text_order.tolist()]),
            problems=_held(held, {**known.problems, **problems}),
            damaged=_held(held, {**known.damaged, **self._damaged}),
        )


def _read(file: Path) -> IndexContent | None:
    """The content of an index file; None if it is missing, damaged or of another version."""
    try:
        return read_content(file, version=_VERSION)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The image index %s is damaged and will be rebuilt: %s.", printable(str(file)), error)
        return None


def rows_of(digests: npt.NDArray[np.uint8], wanted: Collection[str]) -> npt.NDArray[np.bool_]:
    """Whether each of these [n, 16] digests is one of the wanted ones, in hexadecimal; others are ignored."""
    known = b"".join(bytes.fromhex(each) for each in wanted if len(each) == len(_UNREAD))
    return np.isin(_whole(digests), np.frombuffer(known, _WHOLE))


def sorted_hex(digests: npt.NDArray[np.uint8]) -> Iterator[str]:
    """[n, 16] digests in hexadecimal, in ascending order."""
    halves = np.ascontiguousarray(digests).view(">u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return (each.tobytes().hex() for each in digests[order])


def _held(digests: npt.NDArray[np.uint8], reasons: Mapping[str, str]) -> dict[str, str]:
    """The reasons of these digests, sorted."""
    if not reasons:
        return {}
    held = {each.tobytes().hex() for each in digests[rows_of(digests, reasons)]}
    return {digest: reasons[digest] for digest in sorted(held & reasons.keys())}


def _whole(digests: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(digests).view(_WHOLE).reshape(-1)


def _matrix(rows: Iterable[bytes], dtype: npt.DTypeLike, width: int) -> npt.NDArray[Any]:
    return np.frombuffer(b"".join(rows), dtype).reshape(-1, width)


def _sorted_files(
    known: KnownFiles, kept: Rows, added: Sequence[tuple[str, bytes]]
) -> tuple[Rows, KnownFiles]:
    """The order of the files kept and added by their names, and the files in it."""
    names = [*known.names.take(kept), *(name for name, _ in added)]
    packed = np.concatenate([known.packed[kept], _matrix((each for _, each in added), np.int64, 4)])
    order = np.array(sorted(range(len(names)), key=lambda row: by_folder(names[row])), np.int64)
    return order, KnownFiles(Texts.of([names[row] for row in order.tolist()]), packed[order])


def _is_settled(file: FoundFile, started_ns: int) -> bool:
    """Whether a file that is read from this time on cannot change without another signature."""
    return started_ns - file.source.changed_ns(file) > _RACY_NS


def _inspected(data: bytes) -> _Verdict:
    try:
        size = inspect_image(data)
    except DataError as error:
        return _Verdict((0, 0, 0), str(error))
    return _Verdict((size.height, size.width, int(is_read_anew(data))), None)

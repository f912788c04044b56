"""Remembers the inspected images of a folder, so unchanged files are neither read nor decoded again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import PIL
import simplejpeg
import xxhash

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.images import inspect_image, is_read_anew
from simpletuner.helpers.data.optional_formats import optional_formats
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, FoundFile, expect, read_bounded
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.atomic import write_bytes
from simpletuner.helpers.io.names import file_name, printable

logger = logging.getLogger(__name__)

# Other decoders or other rules may judge an image differently.
_VERSION = " ".join(["2", PIL.__version__, simplejpeg.__version__, *optional_formats()])
# In the keys of images from which earlier versions read other pixels; those of all others stay valid.
_READ_ANEW = "colours 2"
# A file that changed this shortly before it was read may change again within one tick of its times.
_RACY_NS = 2_000_000_000


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
        return f"{self.digest} {_READ_ANEW}" if self.is_read_anew else self.digest


@dataclass(slots=True)
class _Entries:
    """The content of an index file."""

    files: dict[str, list[int | str]] = field(default_factory=dict)
    """Name -> signature and digest."""
    contents: dict[str, list[int] | str] = field(default_factory=dict)
    """Digest -> [height, width, 1 if it is read anew], or the reason why the header cannot be used."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Digest -> the reason why the pixels cannot be used."""


def content_digest(data: bytes) -> str:
    """128 bits over the bytes of a file, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def index_file(latents_folder: Path, entry: DatasetConfig | ConditioningConfig | ReferenceConfig) -> Path:
    """The index of a dataset, or of an entry that conditions it, in the folder of its latents."""
    return latents_folder / f"images_{file_name(entry.id)}.json"


def read_unchanged(file: FoundFile, digest: str) -> bytes:
    """The bytes of a file that had this digest in the scan.

    Raises:
        DataError: The file changed or vanished since then.
    """
    try:
        data = read_bounded(file, limit=MAX_FILE_BYTES)
        if content_digest(data) != digest:
            raise DataError("it changed after the scan")
    except DataError as error:
        raise DataError(f"{file.place}: {error}. Start the run again.") from error
    return data


class ImageIndex:
    """The ImageInfo of every image under one folder, stored in one file.

    A file is read again if its size, times or inode changed; the status change time also changes when
    somebody sets the modification time back. Known bytes are not decoded again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = _read(file)
        self._current = _Entries()

    @property
    def folder(self) -> Path:
        """The folder of the latents, in which its file lies."""
        return self._file.parent

    def info(self, image: FoundFile) -> ImageInfo:
        """Look an image up, or read and inspect it."""
        started_ns = time.time_ns()
        if self.knows(image):
            known = self._known.files[image.name]
            digest = str(known[-1])
            if digest in self._known.contents:
                self._current.files[image.name] = known
                return self._info_of(digest, lambda: self._known.contents[digest])
        try:
            data = read_bounded(image, limit=MAX_FILE_BYTES)
        except DataError as error:
            return ImageInfo(digest="", size=None, problem=str(error))
        digest = content_digest(data)
        if started_ns - image.source.changed_ns(image) > _RACY_NS:
            self._current.files[image.name] = [*image.signature, digest]
        return self._info_of(digest, lambda: self._known.contents.get(digest) or _inspected(data))

    def knows(self, image: FoundFile) -> bool:
        """Whether an image is looked up without reading it."""
        known = self._known.files.get(image.name)
        return known is not None and known[:-1] == list(image.signature)

    def expect(self, images: Iterable[FoundFile]) -> None:
        """Tell the source of images which of them will be read, as they are unknown."""
        expect(image for image in images if not self.knows(image))

    def mark_damaged(self, damaged: Mapping[str, str]) -> None:
        """Remember which of the images looked up have damaged pixels; digest -> reason."""
        known = self._current.contents
        self._current.damaged.update({digest: why for digest, why in damaged.items() if digest in known})

    def save(self) -> None:
        """Write the entries of the images looked up since the index was opened; the others are dropped.

        Raises:
            StorageError: The file cannot be written.
        """
        if self._current == self._known:
            return
        body = json.dumps({"version": _VERSION, **asdict(self._current)})
        write_bytes(self._file, json.dumps([content_digest(body.encode()), body]).encode(), durable=False)

    def _info_of(self, digest: str, inspect: Callable[[], list[int] | str]) -> ImageInfo:
        current = self._current
        verdict = current.contents.get(digest)
        if verdict is None:
            verdict = current.contents[digest] = inspect()
        if isinstance(verdict, str):
            return ImageInfo(digest=digest, size=None, problem=verdict)
        if digest in self._known.damaged:
            current.damaged[digest] = self._known.damaged[digest]
        height, width, anew = verdict
        return ImageInfo(
            digest=digest,
            size=Size(height=height, width=width),
            problem=current.damaged.get(digest),
            is_read_anew=bool(anew),
        )


def _inspected(data: bytes) -> list[int] | str:
    try:
        size = inspect_image(data)
    except DataError as error:
        return str(error)
    return [size.height, size.width, int(is_read_anew(data))]


def _read(file: Path) -> _Entries:
    """The stored entries; none if the file is missing or damaged."""
    try:
        digest, body = json.loads(file.read_bytes())
        if digest != content_digest(body.encode()):
            raise ValueError("its digest differs")
        content = json.loads(body)
        if content["version"] == _VERSION:
            return _Entries(content["files"], content["contents"], content["damaged"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The image index %s is damaged and will be rebuilt: %s.", printable(str(file)), error)
    return _Entries()

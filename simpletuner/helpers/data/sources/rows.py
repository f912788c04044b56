"""Rows of a table as images: files that the rows name, or bytes that they hold."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import xxhash

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.configuration.schema.row_keys import Range, RowFilter
from simpletuner.helpers.configuration.schema.storage_keys import source_of
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, CaptionsOf, FoundFile, ImageSource
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.data.sources.read_ahead import UNKNOWN_BYTES, ReadAhead, in_thread
from simpletuner.helpers.data.sources.remote import storage_of
from simpletuner.helpers.data.sources.stored_urls import StoredUrls
from simpletuner.helpers.data.sources.table_files import open_table
from simpletuner.helpers.data.sources.tables import Images, Rows, Table
from simpletuner.helpers.data.sources.urls import UrlReader, shown_url
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import counted, printable
from simpletuner.helpers.io.paths import with_slashes

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    "image",
    "url",
    "image_url",
    "file_name",
    "filename",
    "image_path",
    "path",
    "jpg",
    "png",
    "webp",
)
CAPTION_COLUMNS = ("caption", "text", "prompt")
"""The columns that are taken where the configuration names none; in any case."""
WEB = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table that are read."""

    image: str
    captions: tuple[str, ...]
    fallback: str | None
    filter: RowFilter

    @property
    def others(self) -> tuple[str, ...]:
        """All but that of the images."""
        return (*self.captions, *filter(None, [self.fallback]), *self.filter)


def columns_of(table: Table, entry: ImagePlace) -> Columns:
    """The columns that an entry of the dataset json asks for.

    Raises:
        DataError: The table lacks one of them.
    """
    image = table.column("image_column", named=entry.image_column, known=IMAGE_COLUMNS)
    if image is None:
        raise DataError(
            f"{table.place}: no column is known to hold images. Set image_column. {table.listed()}"
        )
    if not isinstance(entry, DatasetConfig):
        return Columns(image, (), None, {})
    for name in entry.row_filter:
        table.column("row_filter", named=name, known=())
    fallback = table.column("fallback_caption_column", named=entry.fallback_caption_column, known=())
    captions = caption_columns(table, entry.caption_column, is_needed=entry.needs_row_captions)
    return Columns(image, captions, fallback, entry.row_filter)


def caption_columns(table: Table, named: Sequence[str], *, is_needed: bool) -> tuple[str, ...]:
    """The columns of captions; none if none is named, needed or known.

    Raises:
        DataError: The table lacks one that is named, or has none that is known.
    """
    given: Sequence[str | None] = named or [None]
    found = [table.column("caption_column", named=each, known=CAPTION_COLUMNS) for each in given]
    if is_needed and None in found:
        raise DataError(
            f"{table.place}: no column is known to hold captions. Set caption_column. {table.listed()}"
        )
    return tuple(filter(None, found))


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The captions of rows, from one column or several."""

    table: str
    """Its place, for messages."""
    rows: Rows
    captions: tuple[str, ...]
    fallback: str | None

    def of(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """The distinct captions of some rows: those of the fallback only where a row has no other.

        Raises:
            DataError: A cell holds something else than texts.
        """
        found: dict[str, None] = {}
        for number in numbers:
            own = [text for column in self.captions for text in self._texts(column, number)]
            if not own and self.fallback is not None:
                own = self._texts(self.fallback, number)
            found.update(dict.fromkeys(own))
        return tuple(found)

    def _texts(self, column: str, number: int) -> list[str]:
        try:
            return list(_texts_in(self.rows.cells[column][number]))
        except DataError as error:
            place = f"{self.table}, {self.rows.places[number]}"
            raise DataError(f"{place}: the caption in {printable(column)}: {error}") from error


def _texts_in(cell: object) -> Iterator[str]:
    """The captions in a cell; none in an empty one."""
    if isinstance(cell, list | tuple):
        for each in cell:
            yield from _texts_in(each)
    elif isinstance(cell, Mapping):
        fields = ", ".join(map(str, cell))
        raise DataError(f"it has fields ({printable(fields)}). Name one of them, as column.field")
    elif cell is not None and not (isinstance(cell, float) and math.isnan(cell)):
        text = _decoded(cell) if isinstance(cell, bytes) else str(cell)
        if "\0" in text:
            raise DataError(f"it holds a NUL at position {text.index(chr(0))}")
        if text.strip():
            yield text.replace("\r\n", "\n").strip()


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 (byte {data[error.start]:#04x})") from error


def kept_rows(table: Table, rows: Rows, conditions: RowFilter) -> list[int]:
    """The numbers of the rows that meet every condition.

    Raises:
        DataError: A cell cannot be read.
    """

    def cell(name: str, number: int) -> object:
        try:
            return rows.cells[name][number]
        except DataError as error:
            raise DataError(
                f"{table.place}: {printable(name)}: {error}. Correct row_filter or the table."
            ) from error

    return [
        number
        for number in range(len(rows.places))
        if all(_meets(cell(name, number), each) for name, each in conditions.items())
    ]


def _meets(cell: object, condition: Range | tuple[str, ...]) -> bool:
    if isinstance(condition, tuple):
        if isinstance(cell, bool):
            return str(cell).lower() in condition
        is_whole = isinstance(cell, float) and cell.is_integer()
        return str(cell) in condition or (is_whole and f"{cell:.0f}" in condition)
    try:
        number = float(str(cell))
    except ValueError:
        return False
    least = -math.inf if condition.min is None else condition.min
    most = math.inf if condition.max is None else condition.max
    return least <= number <= most


@dataclass(frozen=True, slots=True)
class Address:
    """Where a row says that its image lies."""

    text: str
    """A URL, or a path below the base, or an absolute path."""
    is_url: bool = False


class PathRows(ImageSource[Address]):
    """Images whose paths or URLs stand in a table; rows of the same image are one, with all their captions.

    A relative path begins at the base and stays below it; an absolute one is taken only if nothing but the
    table says where images lie. The signature of a file is that of a local file. That of a URL is its digest:
    what it holds is read once, and again only if the index of the dataset is lost, or if training found
    something else there. URLs that are expected are read ahead.
    """

    holds_rows = True
    reads_ahead = True

    def __init__(
        self, table: Table, columns: Columns, *, base: Path, takes_absolute: bool, entry: ImagePlace
    ) -> None:
        self._table, self._columns = table, columns
        self._base, self._takes_absolute = base.resolve(), takes_absolute
        self._folder = LocalFolder(base)
        self._rows = table.read((columns.image, *columns.others))
        self._web, self._stored = UrlReader(), StoredUrls(partial(storage_of, entry))
        self._ahead = ReadAhead(self._begun, num_bytes=lambda _: UNKNOWN_BYTES)
        self._addresses: dict[str, Address] = {}
        self._numbers: dict[str, list[int]] = {}
        self._bad = list(self._rows.problems)
        self._within: dict[Path, bool] = {}
        kept = kept_rows(table, self._rows, columns.filter)
        for number in kept:
            self._add(number)
        _report(table, self._rows, num_kept=len(kept), num_repeated=len(kept) - len(self._addresses))

    @property
    def place(self) -> str:
        """The table's path."""
        return self._table.place

    def list(self) -> Iterator[tuple[str, Address | str]]:
        """(name, address) of each image, and (place of the row, reason) of each row without one."""
        yield from self._addresses.items()
        yield from self._bad

    def captions(self) -> CaptionsOf | None:
        """The captions of each image."""
        return texts_of(self._table, self._rows, self._columns, numbers=self._numbers.get)

    def stat(self, name: str, entry: Address) -> FoundFile | str:
        """A file or a URL with its signature, or the reason to skip it."""
        if entry.is_url:
            return FoundFile(self, name, ("url", xxhash.xxh3_128_hexdigest(entry.text.encode())))
        path = self._base / entry.text
        try:
            status = path.stat()
            if not PurePath(entry.text).is_absolute() and not self._is_within(path):
                return "it is a link that leaves the folder of the images"
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: a NUL in the path
            is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            return f"no such file from {printable(str(self._base))}" if is_missing else "it cannot be found"
        signature = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return FoundFile(self, name, signature) if stat.S_ISREG(status.st_mode) else "it is no regular file"

    def read(self, file: FoundFile, *, limit: int) -> bytes:
        """The bytes of a file of at most `limit` bytes, here or behind its URL.

        Raises:
            DataError: It is larger or cannot be read; the message does not name it.
            UnreachableError: Its host answered before, and now it does not.
            SourceError: Its storage refuses or does not answer.
        """
        address = self._addresses[file.name]
        if not address.is_url:
            return self._folder.read(FoundFile(self, address.text, ()), limit=limit)
        data = (self._ahead.take(file) or self._begun(file)).result()
        if len(data) > limit:
            raise DataError(f"it is over {limit} bytes")
        return data

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Begin to read URLs that will be asked for, in this order."""
        self._ahead.expect(file for file in files if self._addresses[file.name].is_url)

    def _begun(self, file: FoundFile) -> Future[bytes]:
        url = self._addresses[file.name].text
        if url.lower().startswith(WEB):
            return in_thread(partial(self._web.read, url, limit=MAX_FILE_BYTES))
        return self._stored.begin(url, limit=MAX_FILE_BYTES)

    def place_of(self, name: str) -> str:
        """The table and the image."""
        return f"{self.place}: {printable(name)}"

    def shows_changes(self, file: FoundFile) -> bool:
        """Whether the signature tells a change, as that of a file does and a URL's does not."""
        return not self._addresses[file.name].is_url

    def changed_ns(self, file: FoundFile) -> int:
        """When the status of a file changed last; 0 for a URL."""
        return 0 if self._addresses[file.name].is_url else int(file.signature[2])

    def _add(self, number: int) -> None:
        try:
            name, address = self._named(self._rows.cells[self._columns.image][number])
        except DataError as error:
            self._bad.append((self._rows.places[number], str(error)))
            return
        known = self._addresses.get(name, address)
        if known != address and not all(each.text.lower().startswith(WEB) for each in (known, address)):
            name = f"{name}#{_short(address.text)}"  # of another store or container, which names leave out
        self._addresses.setdefault(name, address)
        self._numbers.setdefault(name, []).append(number)

    def _named(self, cell: object) -> tuple[str, Address]:
        """Name and address of the image that a cell names."""
        if not isinstance(cell, str) or not cell.strip():
            raise DataError("it names no image")
        text = cell.strip()
        scheme, found, _ = text.partition("://")
        if found and source_of(text) is not None:
            query = text.partition("?")[1:]
            try:
                name = printable(shown_url(text)).partition("://")[2]
            except ValueError as error:
                raise DataError(f"it is no URL: {error}") from error
            if not name.partition("/")[2] and not any(query):
                raise DataError(f"its URL {printable(shown_url(text))} names a bucket or server, not a file")
            return f"{name}#{_short(text)}" if any(query) else name, Address(text, is_url=True)
        if found:
            raise DataError(f"{printable(scheme)}:// is not supported; give a path or the URL of a file")
        is_whole = "\\" not in text or os.path.exists(self._base / text)  # of any length
        path = PurePath(text if is_whole else with_slashes(text))
        if path.is_absolute() and path.is_relative_to(self._base):
            path = path.relative_to(self._base)
        if path.is_absolute() and not self._takes_absolute:
            raise DataError(f"its path {printable(text)} leaves instance_data_dir")
        if ".." in path.parts:
            raise DataError(f"its path {printable(text)} leaves the folder of the images")
        return path.as_posix(), Address(str(path))

    def _is_within(self, path: Path) -> bool:
        """Whether a file lies below the base; looked up once for a folder without links in it."""
        if path.is_symlink():
            return path.resolve().is_relative_to(self._base)
        if path.parent not in self._within:
            self._within[path.parent] = path.parent.resolve().is_relative_to(self._base)
        return self._within[path.parent]


class ImageRows(ImageSource[int]):
    """Images whose bytes stand in a table; their names are the numbers of their rows, from 0."""

    holds_rows = True

    def __init__(self, table: Table, images: Images, columns: Columns, *, prefix: str = "") -> None:
        self._table, self._images, self._columns, self._prefix = table, images, columns, prefix
        self._rows = table.read(columns.others)
        self._kept = kept_rows(table, self._rows, columns.filter)
        _report(table, self._rows, num_kept=len(self._kept), num_repeated=0)

    @property
    def place(self) -> str:
        """Where the table lies."""
        return self._table.place

    def list(self) -> Iterator[tuple[str, int | str]]:
        """(name, row) of each image."""
        for row in self._kept:
            yield f"{self._prefix}{row:06d}", row

    def captions(self) -> CaptionsOf | None:
        """The captions of each row."""
        return texts_of(self._table, self._rows, self._columns, numbers=lambda name: [self._row(name)])

    def stat(self, name: str, entry: int) -> FoundFile | str:
        """A row with its signature."""
        return FoundFile(self, name, self._images.signature(entry))

    def read(self, file: FoundFile, *, limit: int) -> bytes:
        """The bytes of a row's image, of at most `limit` bytes.

        Raises:
            DataError: It is larger or cannot be read; the message does not name it.
        """
        cell = self._images.cell(self._columns.image, self._row(file.name))
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not isinstance(data, bytes):
            raise DataError("its row holds no image")
        if len(data) > limit:
            raise DataError(f"it is over {limit} bytes")
        return data

    def place_of(self, name: str) -> str:
        """The table and the row."""
        return f"{self.place}, row {self._row(name)}"

    def changed_ns(self, file: FoundFile) -> int:
        """When the file that holds the row changed last; 0 if that file is never changed."""
        return int(file.signature[2]) if len(file.signature) > 2 else 0

    def _row(self, name: str) -> int:
        return int(name.removeprefix(self._prefix))


def texts_of(
    table: Table, rows: Rows, columns: Columns, *, numbers: Callable[[str], Sequence[int] | None]
) -> CaptionsOf | None:
    """The captions of images by name; None without a column of captions."""
    if not columns.captions:
        return None
    texts = RowTexts(table.place, rows, columns.captions, columns.fallback)

    def of(name: str) -> tuple[str, ...] | None:
        found = numbers(name)
        return None if found is None else texts.of(found)

    return of


def table_rows(entry: ImagePlace) -> ImageSource[Any]:
    """The images of an entry with type table.

    Raises:
        DataError: The table cannot be read, or lacks a column.
        MissingDependencyError: It is a parquet file, and pyarrow is not installed.
    """
    file = entry.table_file
    assert file is not None, "an entry of this type has a table"
    table = open_table(file)
    columns = columns_of(table, entry)
    if images := table.images(columns.image):
        return ImageRows(table, images, columns)
    columns = replace(columns, image=table.path_column(columns.image))
    base = entry.folder
    return PathRows(table, columns, base=base or file.parent, takes_absolute=base is None, entry=entry)


def _report(table: Table, rows: Rows, *, num_kept: int, num_repeated: int) -> None:
    """Log how many rows a filter leaves out, and how many are further rows of an image."""
    if num_kept < len(rows.places):
        logger.info("%s: row_filter keeps %d of %d rows.", table.place, num_kept, len(rows.places))
    if num_repeated:
        number = counted(num_repeated, "row names", "rows name")
        logger.info(
            "%s: %s no image or one that another row names; such rows are captions of one image.",
            table.place,
            number,
        )


def _short(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())

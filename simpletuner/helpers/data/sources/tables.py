"""Tables, of which only the columns that are asked for are read; csv, tsv and jsonl files."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

SEPARATORS = (",", ";", "\t", "|")
_FIRST_LINES = 100
"""Lines of a jsonl file that are read first for the names of its columns."""
_SHOWN_COLUMNS = 20


@dataclass(frozen=True, slots=True)
class Rows:
    """Columns of a table."""

    cells: Mapping[str, Sequence[object]]
    """Column -> the cell of each row that can be read."""
    places: Sequence[str]
    """Of each row, in words for people: "line 2" or "row 0"."""
    problems: tuple[tuple[str, str], ...] = ()
    """(place, reason) of the rows that cannot be read."""


class Images(Protocol):
    """A table that holds images as bytes."""

    def cell(self, column: str, row: int) -> object:
        """The bytes of an image, or an object with a field `bytes`.

        Raises:
            DataError: They cannot be read; the message does not name the row.
        """

    def signature(self, row: int) -> tuple[int | str, ...]:
        """What changes when the image of a row may have changed; the third value, if any, is when."""


class Table(ABC):
    """A table whose columns are known and whose rows are read on demand."""

    place: str
    """Where it lies, in words for people."""
    columns: tuple[str, ...]

    @abstractmethod
    def read(self, columns: Iterable[str]) -> Rows:
        """The cells of some columns; a column with a dot is a field of another one.

        Raises:
            DataError: The table cannot be read; the message names it.
        """

    def images(self, column: str) -> Images | None:
        """The images that a column holds as bytes, which are not to be read with `read`; None for paths."""
        del column
        return None

    def path_column(self, column: str) -> str:
        """The column of the paths in a column of images that are not bytes."""
        return column

    def find(self, column: str) -> bool:
        """Whether a column exists, or the column of which this is a field."""
        return split_column(column, self.columns) is not None

    def column(self, key: str, *, named: str | None, known: Sequence[str]) -> str | None:
        """The column that a key names, or else the first of the known ones there is, in any case.

        Raises:
            DataError: There is no column of that name.
        """
        if named is not None:
            if not self.find(named):
                hint = nearest(named, self.columns)
                raise DataError(f"{self.place}: {key} {named!r} is no column.{hint} {self.listed()}")
            return named
        by_lower = {each.lower(): each for each in reversed(self.columns)}
        return next((by_lower[each] for each in known if each in by_lower), None)

    def listed(self) -> str:
        """A sentence with the names of the columns."""
        names = ", ".join(printable(each) for each in self.columns[:_SHOWN_COLUMNS])
        more = len(self.columns) - _SHOWN_COLUMNS
        return f"Its columns are: {names}{f' and {more} more' if more > 0 else ''}."


def split_column(column: str, columns: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """(column, fields within it) of a name with dots; None if there is no such column."""
    parts = column.split(".")
    for number in range(len(parts), 0, -1):
        name = ".".join(parts[:number])
        if name in columns:
            return name, tuple(parts[number:])
    return None


def field_of(cell: object, fields: Sequence[str]) -> object:
    """The field within a cell; None if the cell has none of that name."""
    for each in fields:
        if not isinstance(cell, Mapping):
            return None
        cell = cell.get(each)
    return cell


@dataclass
class CsvTable(Table):
    """A table with a header in its first line; each cell is a text.

    Raises:
        DataError: The file cannot be read, is empty or not UTF-8, or two columns have one name.
    """

    file: Path
    separator: str = ""
    """Empty to find it in the header."""
    place: str = field(init=False)
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.place = printable(str(self.file))
        if not self.separator:
            header = next(iter(self._lines()), "")
            self.separator = max(SEPARATORS, key=header.count)
        self.columns = next((tuple(cells) for _, cells in self._parsed()), ())
        if not any(self.columns):
            raise DataError(f"{self.place} is empty. Its first line must name the columns.")
        twice = [each for each in self.columns if self.columns.count(each) > 1]
        if twice:
            raise DataError(f"{self.place}: two columns are named {twice[0]!r}. Rename one of them.")

    def read(self, columns: Iterable[str]) -> Rows:
        """The texts of some columns."""
        names = tuple(dict.fromkeys(columns))
        numbers = [self.columns.index(name) for name in names]
        kept: list[list[object]] = [[] for _ in names]
        places: list[str] = []
        problems: list[tuple[str, str]] = []
        for line, cells in islice(self._parsed(), 1, None):
            if len(cells) != len(self.columns):
                reason = f"it has {len(cells)} cells and the header has {len(self.columns)}"
                problems.append((f"line {line}", reason))
                continue
            places.append(f"line {line}")
            for column, number in zip(kept, numbers, strict=True):
                column.append(cells[number])
        return Rows(dict(zip(names, kept, strict=True)), places, tuple(problems))

    def _parsed(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its last line, cells) of each row that is not blank, the header too."""
        reader = csv.reader(self._lines(), delimiter=self.separator, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            text = f"{self.place}, line {reader.line_num}: it cannot be read as csv: {error}."
            raise DataError(f"{text} Check its quotation marks.") from error

    def _lines(self) -> Iterator[str]:
        try:
            with self.file.open(encoding="utf-8-sig", newline="") as opened:
                yield from opened
        except OSError as error:
            raise unreadable(self.place, error) from error
        except UnicodeDecodeError as error:
            found = f"it is not UTF-8 (byte {error.object[error.start]:#04x})"
            raise DataError(f"{self.place}: {found}. Save it as UTF-8.") from error


@dataclass
class JsonTable(Table):
    """A table of JSON objects, one on each line.

    Raises:
        DataError: The file cannot be read, or none of its first lines is an object.
    """

    file: Path
    place: str = field(init=False)
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.place = printable(str(self.file))
        first = [row for _, row in islice(self._parsed(), _FIRST_LINES) if isinstance(row, dict)]
        self.columns = tuple(dict.fromkeys(str(name) for row in first for name in row))
        if not self.columns:
            raise DataError(f"{self.place} must hold a JSON object on each line.")
        self._knows_all = False

    def find(self, column: str) -> bool:
        """Whether a column exists; every line is read if the first ones do not have it."""
        return super().find(column) or (self._learns_more() and super().find(column))

    def column(self, key: str, *, named: str | None, known: Sequence[str]) -> str | None:
        """The column that a key names, or else the first of the known ones; see `find`."""
        found = super().column(key, named=named, known=known)
        if found is None and self._learns_more():
            return super().column(key, named=named, known=known)
        return found

    def _learns_more(self) -> bool:
        """Read the names of the columns on every line; False if that was done before."""
        if self._knows_all:
            return False
        rows = (row for _, row in self._parsed() if isinstance(row, dict))
        self.columns = tuple(dict.fromkeys(chain(self.columns, (str(name) for row in rows for name in row))))
        self._knows_all = True
        return True

    def read(self, columns: Iterable[str]) -> Rows:
        """The values of some columns; None where an object lacks one."""
        names = {name: split_column(name, self.columns) for name in columns}
        kept: dict[str, list[object]] = {name: [] for name in names}
        places: list[str] = []
        problems: list[tuple[str, str]] = []
        for line, row in self._parsed():
            if isinstance(row, str):
                problems.append((f"line {line}", row))
                continue
            places.append(f"line {line}")
            for name, found in names.items():
                kept[name].append(None if found is None else field_of(row.get(found[0]), found[1]))
        return Rows(kept, places, tuple(problems))

    def _parsed(self) -> Iterator[tuple[int, dict[str, object] | str]]:
        """(number, object or the reason why it is none) of each line that is not blank."""
        try:
            with self.file.open("rb") as opened:
                yield from ((number, _object(line)) for number, line in enumerate(opened, 1) if line.strip())
        except OSError as error:
            raise unreadable(self.place, error) from error


def _object(line: bytes) -> dict[str, object] | str:
    """The object of a line, or the reason why it cannot be read."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 (byte {line[error.start]:#04x})"
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    return found if isinstance(found, dict) else "it is no JSON object"


def unreadable(place: str, error: OSError) -> DataError:
    """The error of a table that cannot be opened."""
    return DataError(f"{place}: it cannot be read: {error.strerror or error}.")

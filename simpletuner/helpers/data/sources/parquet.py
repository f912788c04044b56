"""Parquet files: columns of text as a whole, columns of images a few rows at a time."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from simpletuner.helpers.data.sources.arrow import EXTRA, ArrowTable
from simpletuner.helpers.data.sources.tables import Rows, field_of, split_column
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import one_line_reason, printable
from simpletuner.helpers.io.optional import require

logger = logging.getLogger(__name__)

BATCH_ROWS = 16
KEPT_BATCHES = 8
LARGE_GROUP_BYTES = 256 << 20
"""A row group above this is warned of."""


class ParquetTable(ArrowTable):
    """A parquet file, mapped into memory.

    A column of images is decoded in order, BATCH_ROWS rows at a time, and the last few batches are kept: so
    rows are best asked for in their order, and memory does not grow with the file. Asking backwards decodes
    the row group again from its start.

    Raises:
        DataError: The file cannot be read.
        MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, file: Path) -> None:
        parquet: Any = require("pyarrow.parquet", extra=EXTRA)
        self._errors: tuple[type[Exception], ...] = (require("pyarrow", extra=EXTRA).ArrowException, OSError)
        place = printable(str(file))
        try:
            status = file.stat()
            self._opened: Any = parquet.ParquetFile(str(file), memory_map=True)
        except self._errors as error:
            raise _damaged(place, error) from error
        super().__init__(self._opened.schema_arrow, place=place)
        self._status = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        self._lock = Lock()
        self._cursors: dict[str, _Cursor] = {}

    def read(self, columns: Iterable[str]) -> Rows:
        """The cells of some columns."""
        names = tuple(columns)
        tops = dict.fromkeys((split_column(each, self.columns) or (each, ()))[0] for each in names)
        try:
            table = self._opened.read(columns=list(tops))
        except self._errors as error:
            raise _damaged(self.place, error) from error
        return self.cells_of(table, names, num_rows=self._opened.metadata.num_rows)

    def images(self, column: str) -> ParquetTable | None:
        """Itself if the cells are bytes, or objects with a field `bytes` that is not always null."""
        if not self.holds_bytes(column) or self._is_empty(f"{column}.bytes"):
            return None
        metadata = self._opened.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        large = max(groups, key=lambda each: each.total_byte_size, default=None)
        if large is not None and large.num_rows > 1 and large.total_byte_size > LARGE_GROUP_BYTES:
            logger.warning(
                "%s: a row group of %d rows has %d MiB, and an image is found from its start. If reading is "
                "slow, write the file with row groups of 100 rows.",
                self.place,
                large.num_rows,
                large.total_byte_size >> 20,
            )
        return self

    def signature(self, row: int) -> tuple[int | str, ...]:
        """(bytes, modification time, status change time, inode) of the file and the row; nanoseconds."""
        return (*self._status, row)

    def cell(self, column: str, row: int) -> object:
        """One cell of a column of images.

        Raises:
            DataError: It cannot be decoded; the message does not name it.
        """
        top, fields = split_column(column, self.columns) or (column, ())
        with self._lock:
            if top not in self._cursors:
                self._cursors[top] = _Cursor(self._opened, top)
            try:
                return field_of(self._cursors[top].cell(row), fields)
            except self._errors as error:
                del self._cursors[top]
                raise DataError(f"the table is damaged here: {one_line_reason(error)}") from error

    def _is_empty(self, leaf: str) -> bool:
        """Whether a column is null in every row, as the statistics of the file say."""
        metadata = self._opened.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        chunks = [
            (chunk.statistics, group.num_rows)
            for group in groups
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema == leaf
        ]
        return bool(chunks) and all(
            found is not None and found.has_null_count and found.null_count == rows for found, rows in chunks
        )


def _damaged(place: str, error: Exception) -> DataError:
    reason = one_line_reason(error)
    return DataError(f"{place}: it is no parquet file, or damaged: {reason}. Write it again.")


class _Cursor:
    """Reads one column of a parquet file forward."""

    def __init__(self, opened: Any, column: str) -> None:
        self._opened, self._column = opened, column
        ends, end = [], 0
        for group in range(opened.metadata.num_row_groups):
            end += opened.metadata.row_group(group).num_rows
            ends.append(end)
        self._ends = ends
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._next = 0
        self._kept: OrderedDict[int, Any] = OrderedDict()
        """First row of a batch -> the batch."""

    def cell(self, row: int) -> object:
        """The cell of a row of the file."""
        for first, batch in self._kept.items():
            if first <= row < first + len(batch):
                self._kept.move_to_end(first)
                return batch[row - first].as_py()
        group = next(number for number, end in enumerate(self._ends) if row < end)
        if group != self._group or row < self._next:
            self._group = group
            self._next = self._ends[group - 1] if group else 0
            self._batches = self._opened.iter_batches(
                batch_size=BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        while True:
            batch = next(self._batches).column(0)
            first, self._next = self._next, self._next + len(batch)
            if row < self._next:
                self._kept[first] = batch
                if len(self._kept) > KEPT_BATCHES:
                    self._kept.popitem(last=False)
                return batch[row - first].as_py()

"""Tables in Arrow's memory layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from simpletuner.helpers.data.sources.tables import Rows, Table, field_of, split_column
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.optional import require

EXTRA = "datasets"
"""Extra of this package that installs pyarrow and datasets."""


class ArrowCells(Sequence[object]):
    """The cells of a column of an Arrow table, or of a field within it, as Python values."""

    def __init__(self, column: Any, fields: Sequence[str] = ()) -> None:
        self._column, self._fields = column, fields

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        try:
            return field_of(self._column[row].as_py(), self._fields)
        except UnicodeDecodeError as error:
            raise DataError(f"row {row} is not UTF-8") from error


class RowPlaces(Sequence[str]):
    """The places of rows that are counted from 0."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, row: Any) -> Any:
        return f"row {row}"


class ArrowTable(Table):
    """A table with an Arrow schema.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, schema: Any, *, place: str) -> None:
        self.arrow: Any = require("pyarrow", extra=EXTRA)
        self.schema, self.place = schema, place
        self.columns = tuple(map(str, schema.names))

    def holds_bytes(self, column: str) -> bool:
        """Whether the cells are bytes, or objects with a field `bytes`, as `datasets` writes images."""
        kind = self._type(column)
        types = self.arrow.types
        if types.is_struct(kind):
            kind = self._type(f"{column}.bytes")
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def path_column(self, column: str) -> str:
        """The field `path` of objects without bytes."""
        return f"{column}.path" if self.arrow.types.is_struct(self._type(column)) else column

    def cells_of(self, table: Any, columns: Iterable[str], *, num_rows: int) -> Rows:
        """The cells of some columns, which an Arrow table holds."""
        names = {name: split_column(name, self.columns) or (name, ()) for name in columns}
        cells = {name: ArrowCells(table.column(top), fields) for name, (top, fields) in names.items()}
        return Rows(cells, RowPlaces(num_rows))

    def _type(self, column: str) -> Any:
        """The Arrow type of a column, or of a field within one; that of null if there is no such field."""
        top, fields = split_column(column, self.columns) or (column, ())
        kind = self.schema.field(top).type
        for each in fields:
            if not self.arrow.types.is_struct(kind) or kind.get_field_index(each) < 0:
                return self.arrow.null()
            kind = kind.field(each).type
        return kind

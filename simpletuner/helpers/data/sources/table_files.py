"""Opens a table by the suffix of its file."""

from __future__ import annotations

from pathlib import Path

from simpletuner.helpers.data.sources.parquet import ParquetTable
from simpletuner.helpers.data.sources.tables import CsvTable, JsonTable, Table


def open_table(file: Path) -> Table:
    """The table in a file with one of TABLE_SUFFIXES.

    Raises:
        DataError: It cannot be read.
        MissingDependencyError: It is a parquet file, and pyarrow is not installed.
    """
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return CsvTable(file, separator="\t" if suffix == ".tsv" else "")
    return JsonTable(file) if suffix in (".jsonl", ".ndjson") else ParquetTable(file)

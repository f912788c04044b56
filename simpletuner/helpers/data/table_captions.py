"""Captions that stand in a table: the one that holds the images, or one beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.row_keys import CaptionTable
from simpletuner.helpers.data.captions import MISSING, CaptionReader, Captions, within_limit
from simpletuner.helpers.data.sources.base import CaptionsOf, FoundFile, Scan
from simpletuner.helpers.data.sources.rows import RowTexts, caption_columns
from simpletuner.helpers.data.sources.table_files import open_table
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable


class TableCaptions(CaptionReader):
    """The captions that the scan found in a table, several of one image if the table has several."""

    reads_table = True

    @staticmethod
    def completed(scan: Scan, config: DatasetConfig) -> Scan:
        """The scan with the captions of the table that `parquet` names.

        Raises:
            DataError: The table cannot be read or does not fit the images.
        """
        if config.parquet is None:
            return scan
        return replace(scan, listed=texts_beside(config.parquet, scan.images))

    def read(self, file: FoundFile) -> Captions:
        """The captions of an image; none if its row has none, or there is no such row."""
        assert self.scan.listed is not None, "the configuration names a table"
        texts = self.scan.listed(file.name)
        if texts is None:
            return MISSING
        if not texts:
            return Captions(texts=("",), note="empty")
        return within_limit(texts)


def texts_beside(spec: CaptionTable, images: Sequence[FoundFile]) -> CaptionsOf:
    """The captions that a table holds of images which lie elsewhere, by the images' names.

    A row belongs to the images of the name in its filename_column: with its folder or without, with its
    suffix or without.

    Raises:
        DataError: The table cannot be read or lacks a column, no image has a row, or rows whose name has no
            folder could belong to images of several folders.
    """
    table = open_table(spec.path)
    names = table.column("parquet.filename_column", named=spec.filename_column, known=())
    assert names is not None, "it is named"
    captions = caption_columns(table, spec.caption_column, is_needed=True)
    fallback = table.column("parquet.fallback_caption_column", named=spec.fallback_caption_column, known=())
    rows = table.read((names, *captions, *filter(None, [fallback])))
    by_name: dict[str, list[int]] = {}
    for number, cell in enumerate(rows.cells[names]):
        by_name.setdefault(_identity(cell), []).append(number)
    found: dict[str, list[int]] = {}
    folders: dict[str, str] = {}
    for image in images:
        key = next((each for each in _spellings(image.name) if each in by_name), None)
        if key is None:
            continue
        found[image.name] = by_name[key]
        folder = os.path.dirname(image.name)
        if "/" not in key and folders.setdefault(key, folder) != folder:
            raise DataError(
                f"{table.place}: {printable(key)} could be an image of {_shown(folder)} and of "
                f"{_shown(folders[key])}. Write the folder into {printable(names)}."
            )
    if not found:
        row = printable(next(iter(by_name), "")) or "there is none"
        image_name = next((printable(image.name) for image in images), "there is none")
        raise DataError(
            f"{table.place}: no row has the name of an image; the first name in {printable(names)} is {row}, "
            f"the first image is {image_name}. Correct parquet.filename_column. {table.listed()}"
        )
    texts = RowTexts(table.place, rows, captions, fallback)

    def of(name: str) -> tuple[str, ...] | None:
        return texts.of(found[name]) if name in found else None

    return of


def _shown(folder: str) -> str:
    return printable(folder) or "the top"


def _identity(cell: object) -> str:
    """The name in a cell: a whole number is written without decimals."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return "" if cell is None else str(cell).strip().replace("\\", "/").removeprefix("./")


def _spellings(name: str) -> tuple[str, ...]:
    """The names by which a table may call an image, the most exact first."""
    stem, base = os.path.splitext(name)[0], os.path.basename(name)
    return (name, stem, base, os.path.splitext(base)[0])

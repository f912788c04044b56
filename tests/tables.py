"""Images and tables that the tests of rows share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def png(seed: int, *, edge: int = 64) -> bytes:
    """The file of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def embedded(images: Sequence[bytes | None], **columns: Sequence[object]) -> pyarrow.Table:
    """A table with images as objects of bytes and path, as `datasets` writes them."""
    cells = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.table({"image": pyarrow.array(cells, kind), **columns})


def write(table: pyarrow.Table, file: Path, *, group: int | None = None) -> Path:
    """Write a parquet file with row groups of this many rows."""
    pyarrow.parquet.write_table(table, file, row_group_size=group)
    return file

"""A labelled grid of images: a row for each prompt, a column for each adapter."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from simpletuner.helpers.io.atomic import write_bytes

MARGIN_PX = 8
LINE_PX = 16
LABEL_WIDTH_PX = 200
SMALLEST_CELL_PX = 128
LARGEST_CELL_PX = 512


@dataclass(frozen=True, slots=True)
class Row:
    """Images of one prompt, size and seed, one per column; None leaves a cell empty."""

    label: str
    images: tuple[Image.Image | None, ...]


def labelled_grid(rows: Sequence[Row], *, columns: Sequence[str]) -> Image.Image:
    """Draw the rows below the column titles, each image scaled to its cell, each label left of its row."""
    cell_px = _cell_px(rows)
    step_px = cell_px + MARGIN_PX
    width = LABEL_WIDTH_PX + MARGIN_PX + len(columns) * step_px
    height = LINE_PX + 2 * MARGIN_PX + len(rows) * step_px
    grid = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for column, title in enumerate(columns):
        while font.getlength(title) > cell_px:
            title = f"{title[:-2]}\N{HORIZONTAL ELLIPSIS}"
        draw.text((LABEL_WIDTH_PX + MARGIN_PX + column * step_px, MARGIN_PX), title, fill="black", font=font)
    for index, row in enumerate(rows):
        top = LINE_PX + 2 * MARGIN_PX + index * step_px
        draw.multiline_text((MARGIN_PX, top), _wrap(row.label, cell_px=cell_px), fill="black", font=font)
        for column, image in enumerate(row.images):
            if image is not None:
                grid.paste(_fit(image, cell_px), (LABEL_WIDTH_PX + MARGIN_PX + column * step_px, top))
    return grid


def save_png(image: Image.Image, file: Path, *, parameters: str | None = None) -> None:
    """Write an image atomically, with the text of its parameters where image programs look for it."""
    data, metadata = io.BytesIO(), PngInfo()
    if parameters is not None:
        metadata.add_text("parameters", parameters)  # as iTXt where it is not Latin-1
    image.save(data, format="PNG", pnginfo=metadata)
    write_bytes(file, data.getvalue())


def _cell_px(rows: Sequence[Row]) -> int:
    edges = [max(image.size) for row in rows for image in row.images if image is not None]
    return min(max([SMALLEST_CELL_PX, *edges]), LARGEST_CELL_PX)


def _fit(image: Image.Image, cell_px: int) -> Image.Image:
    scale = cell_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Nearest keeps the pixels of a small image visible.
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrap(label: str, *, cell_px: int) -> str:
    # Pillow's built-in font is Latin-1 only.
    drawable = label.encode("latin-1", "replace").decode("latin-1")
    lines = [part for line in drawable.splitlines() for part in textwrap.wrap(line, width=30) or [""]]
    return "\n".join(lines[: cell_px // LINE_PX])

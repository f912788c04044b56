"""Validation images by step, scaled down to keep the report small."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from simpletuner.helpers.io.run_folder import (
    BASE_FOLDER,
    EMA_FOLDER,
    cached_image_files,
    image_files,
    parse_image_name,
    validation_step_folders,
)
from simpletuner.helpers.reporting.html_report.markup import escape, format_count, note

LARGEST_EDGE_PX = 448
# Images up to this edge stay lossless and are shown with hard pixels.
PIXEL_ART_EDGE_PX = 96
JPEG_QUALITY = 84
MAX_STEPS = 24
BUDGET_BYTES = 9 << 20
"""Limit for all thumbnails; base64 adds a third in the page."""
MAX_PIXELS = 1 << 26

OWN_RUN = ""
"""Column.run of the run that the report is of."""


class Column(NamedTuple):
    """A validation of a run; columns are sorted by run, then step."""

    run: str
    step: int
    is_ema: bool
    """Whether its images are those of the EMA weights."""

    @property
    def title(self) -> str:
        """Of its column in the table."""
        return f"{f'{self.run}, ' if self.run else ''}step {self.step:,}{', EMA' if self.is_ema else ''}"

    @property
    def series(self) -> str:
        """What the same weights are called at every step."""
        return f"{self.run or 'this run'}{', EMA' if self.is_ema else ''}"


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Image files of one prompt, size and seed."""

    prompt: str
    details: str
    """Size, seed and a strength other than 1, for display."""
    fixed: tuple[tuple[str, Path], ...]
    """(title, file) of the images that training does not change: base model, other adapter."""
    by_column: dict[Column, Path]


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An embedded image."""

    uri: str
    width: int
    height: int
    num_bytes: int


def render_gallery(rows: Sequence[ImageRow], *, compared: Sequence[str] = ()) -> str:
    """A table with a row of images below each prompt; a note names the steps left out to save space.

    The page's script shows two columns side by side above it. A note names compared runs without an image.
    """
    rows = [row for row in rows if row.by_column or row.fixed]
    if not rows:
        return ""
    columns, shown = _affordable(rows)
    titles = list(dict.fromkeys(title for row in shown for title, _ in row.fixed))
    heads = "".join(
        [_head(title, f'data-series="{escape(title)}"') for title in titles]
        + [
            _head(each.title, f'data-series="{escape(each.series)}" data-step="{each.step}"')
            for each in columns
        ]
    )
    bodies = "\n".join(_body(row, titles, columns) for row in shown)
    return (
        f"{_left_out(_columns(rows), columns, num_rows=len(rows) - len(shown))}"
        f"{_without_images(_columns(rows), compared)}"
        f'<div class="viewer"></div>\n{image_table(heads, bodies)}'
    )


def image_table(heads: str, bodies: str) -> str:
    """A table of images, which the page's script enlarges; `heads` are cells and `bodies` row groups."""
    table = f"<thead><tr>{heads}</tr></thead>\n{bodies}\n"
    return f'<div class="scroll"><table class="pictures">\n{table}</table></div>'


@lru_cache(maxsize=4096)
def thumbnail(file: Path, _changed_ns: int) -> Thumbnail:
    """The image scaled down as a data URI; `_changed_ns`, the file's mtime, is part of the cache key.

    Raises:
        OSError: The file is unreadable.
        ValueError: The image has more than MAX_PIXELS.
    """
    with Image.open(file) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{file} has {opened.width}x{opened.height} pixels")
        image = opened.convert("RGB")
    is_small = max(image.size) <= PIXEL_ART_EDGE_PX
    data = io.BytesIO()
    if is_small:
        image.save(data, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST_EDGE_PX, LARGEST_EDGE_PX), Image.Resampling.LANCZOS)
        image.save(data, "JPEG", quality=JPEG_QUALITY)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    image_format = "png" if is_small else "jpeg"
    return Thumbnail(f"data:image/{image_format};base64,{encoded}", *image.size, data.tell())


def spread_evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` >= 2 of the items: first, last and evenly spaced ones between."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def thumbnail_or_none(file: Path) -> Thumbnail | None:
    """The image scaled down; None for a file that is gone or damaged."""
    try:
        return thumbnail(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow raises any of these
        return None


def _affordable(rows: Sequence[ImageRow]) -> tuple[list[Column], list[ImageRow]]:
    """Columns and rows within BUDGET_BYTES: first, last and evenly spaced steps of each run; leading rows."""
    shown_rows, every = list(rows), _columns(rows)
    while len(shown_rows) > 1 and _num_bytes(shown_rows, _spread(every, 2)) > BUDGET_BYTES:
        shown_rows = shown_rows[: len(shown_rows) // 2]
    count = MAX_STEPS
    shown = _spread(every, count)
    while count > 2 and _num_bytes(shown_rows, shown) > BUDGET_BYTES:
        count -= 1
        shown = _spread(every, count)
    has_image = set(_columns(shown_rows))
    return [column for column in shown if column in has_image], shown_rows


def _columns(rows: Sequence[ImageRow]) -> list[Column]:
    return sorted({column for row in rows for column in row.by_column})


def _spread(columns: Sequence[Column], count: int) -> list[Column]:
    """The columns of `count` steps of each run."""
    steps: dict[str, dict[int, None]] = {}
    for column in columns:
        steps.setdefault(column.run, {})[column.step] = None
    kept = {run: set(spread_evenly([*each], count)) for run, each in steps.items()}
    return [column for column in columns if column.step in kept[column.run]]


def _num_bytes(rows: Sequence[ImageRow], columns: Sequence[Column]) -> int:
    files = [file for row in rows for _, file in row.fixed]
    files += [row.by_column[column] for row in rows for column in columns if column in row.by_column]
    return sum(image.num_bytes for image in map(thumbnail_or_none, files) if image is not None)


def _head(title: str, attributes: str) -> str:
    return f"<th scope=col {attributes}>{escape(title)}</th>"


def _body(row: ImageRow, titles: Sequence[str], columns: Sequence[Column]) -> str:
    fixed = dict(row.fixed)
    cells = [_cell(row, title, fixed.get(title), css_class="fixed") for title in titles]
    cells += [_cell(row, each.title, row.by_column.get(each), css_class="made") for each in columns]
    head = f"<span>{escape(row.prompt) or '<em>no prompt</em>'} <small>{escape(row.details)}</small></span>"
    return (
        f'<tbody><tr><th scope="rowgroup" colspan="{len(cells)}">{head}</th></tr>'
        f"<tr>{''.join(cells)}</tr></tbody>"
    )


def _cell(row: ImageRow, title: str, file: Path | None, *, css_class: str) -> str:
    image = None if file is None else thumbnail_or_none(file)
    if image is None:
        return f'<td class="{css_class}"><span class="missing">none</span></td>'
    alt = escape(", ".join(filter(None, (row.prompt or "no prompt", title, row.details))))
    small = ' class="pixels"' if max(image.width, image.height) <= PIXEL_ART_EDGE_PX else ""
    return (
        f'<td class="{css_class}"><img{small} alt="{alt}" width="{image.width}" height="{image.height}" '
        f'decoding="async" src="{image.uri}"></td>'
    )


def _left_out(every: Sequence[Column], shown: Sequence[Column], *, num_rows: int) -> str:
    parts = []
    for run in dict.fromkeys(column.run for column in every):
        kept = {column.step for column in shown if column.run == run}
        missing = sorted({column.step for column in every if column.run == run} - kept)
        if missing:
            steps = ", ".join(f"{step:,}" for step in missing)
            name = f" of {run}" if run else ""
            number = format_count(len(missing), "validation")
            parts.append(f"{number}{name} left out to keep the page small: step {steps}.")
    if num_rows:
        parts.append(f"{format_count(num_rows, 'prompt')} left out to keep the page small.")
    if parts:
        parts.append("Every image is in the run's folder validation/.")
    return note(" ".join(parts))


def _without_images(columns: Sequence[Column], compared: Sequence[str]) -> str:
    missing = [title for title in compared if title not in {column.run for column in columns}]
    return note(
        " ".join(f"{title} has no image of a prompt, size, seed and strength here." for title in missing)
    )


def with_others(rows: Sequence[ImageRow], others: Mapping[str, Sequence[ImageRow]]) -> list[ImageRow]:
    """The rows with the images of other runs, by title, of the same prompt, size, seed and strength."""
    return [
        replace(
            row,
            by_column={
                **row.by_column,
                **{
                    column._replace(run=title): file
                    for title, other in others.items()
                    for each in other
                    if (each.prompt, each.details) == (row.prompt, row.details)
                    for column, file in each.by_column.items()
                },
            },
        )
        for row in rows
    ]


def image_rows(
    folder: Path, prompts: Sequence[dict[str, object]], *, compared_with: str | None
) -> list[ImageRow]:
    """The images in a run's validation folder.

    `prompts` is the manifest's list. Of images that it lacks, as those of an earlier start with other prompts
    or sizes, prompt, size and seed come from the file names.
    """
    made = {
        Column(OWN_RUN, step, bool(name)): image_files(each / name)
        for step, each in validation_step_folders(folder)
        for name in ("", EMA_FOLDER)
    }
    base = {name: file.name for name, file in cached_image_files(folder).items()}
    names = {name for files in made.values() for name in files} | (set() if prompts else set(base))
    others: list[dict[str, object]] = [
        {"prompt": name, **parse_image_name(name), "name": name, "base": base.get(name)}
        for name in sorted(names - {str(prompt["name"]) for prompt in prompts})
    ]
    other = compared_with or "compared with"
    return [_row(folder, prompt, made, compared_with=other) for prompt in [*prompts, *others]]


def _row(
    folder: Path, prompt: dict[str, object], made: dict[Column, dict[str, Path]], *, compared_with: str
) -> ImageRow:
    name = str(prompt["name"])
    names = {"base model": prompt.get("base"), compared_with: prompt.get("other")}
    fixed = {title: folder / BASE_FOLDER / str(file) for title, file in names.items() if file}
    details = [
        str(prompt[key]) if key == "size" else f"{key} {prompt[key]}"
        for key in ("size", "seed", "strength")
        if key in prompt and (key, prompt[key]) != ("strength", 1)
    ]
    return ImageRow(
        prompt=str(prompt.get("prompt", "")),
        details=", ".join(details),
        fixed=tuple((title, file) for title, file in fixed.items() if file.exists()),
        by_column={column: files[name] for column, files in made.items() if name in files},
    )

"""Validation pictures over time, small enough for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from simpletuner.helpers.io.run_folder import (
    BASE_FOLDER,
    cached_image_files,
    image_files,
    parse_image_name,
    validation_step_folders,
)
from simpletuner.helpers.reporting.html_report.markup import escape, format_count, note

LARGEST_EDGE_PX = 448
# Smaller pictures are kept to the pixel, and shown with their pixels.
PIXEL_ART_EDGE_PX = 96
JPEG_QUALITY = 84
MAX_STEPS = 24
BUDGET_BYTES = 9 << 20
"""Of all pictures as files; inside a page they are a third longer."""
MAX_PIXELS = 1 << 26


@dataclass(frozen=True, slots=True)
class ImageRow:
    """The pictures of one prompt, size and seed."""

    prompt: str
    details: str
    """Size and seed, in words."""
    fixed: tuple[tuple[str, Path], ...]
    """Title and file of the pictures that no training changes: the base model, another adapter."""
    by_step: dict[int, Path]


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture as it is embedded."""

    uri: str
    width: int
    height: int
    num_bytes: int


def render_gallery(rows: Sequence[ImageRow]) -> str:
    """A table, a row of pictures below each prompt; says which steps and prompts were left out for size."""
    rows = [row for row in rows if row.by_step or row.fixed]
    if not rows:
        return ""
    every_step = sorted({step for row in rows for step in row.by_step})
    steps, shown = _affordable(rows, every_step)
    titles = list(dict.fromkeys(title for row in shown for title, _ in row.fixed))
    heads = "".join(f"<th scope=col>{escape(title)}</th>" for title in [*titles, *map(_step_title, steps)])
    bodies = "\n".join(_body(row, titles, steps) for row in shown)
    return (
        f"{_left_out(every_step, steps, num_rows=len(rows) - len(shown))}"
        '<div class="scroll"><table class="pictures">\n'
        f"<thead><tr>{heads}</tr></thead>\n{bodies}\n</table></div>"
    )


@lru_cache(maxsize=4096)
def thumbnail(file: Path, _changed_ns: int) -> Thumbnail:
    """A picture as a data URI, kept until the file changes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large.
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
    """At most `count`, two or more, of the items: the first, the last and others evenly between."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _thumbnail(file: Path) -> Thumbnail | None:
    try:
        return thumbnail(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises
        return None


def _affordable(rows: Sequence[ImageRow], steps: Sequence[int]) -> tuple[list[int], list[ImageRow]]:
    """The steps, first and last and evenly between, and the first rows that the budget allows."""
    shown = list(rows)
    while len(shown) > 1 and _num_bytes(shown, spread_evenly(steps, 2)) > BUDGET_BYTES:
        shown = shown[: len(shown) // 2]
    chosen = spread_evenly(steps, MAX_STEPS)
    while len(chosen) > 2 and _num_bytes(shown, chosen) > BUDGET_BYTES:
        chosen = spread_evenly(steps, len(chosen) - 1)
    return chosen, shown


def _num_bytes(rows: Sequence[ImageRow], steps: Sequence[int]) -> int:
    files = [file for row in rows for _, file in row.fixed]
    files += [row.by_step[step] for row in rows for step in steps if step in row.by_step]
    return sum(image.num_bytes for image in map(_thumbnail, files) if image is not None)


def _body(row: ImageRow, titles: Sequence[str], steps: Sequence[int]) -> str:
    fixed = dict(row.fixed)
    cells = [_cell(row, title, fixed.get(title), css_class="fixed") for title in titles]
    cells += [_cell(row, _step_title(step), row.by_step.get(step), css_class="made") for step in steps]
    head = f"<span>{escape(row.prompt) or '<em>no prompt</em>'} <small>{escape(row.details)}</small></span>"
    return (
        f'<tbody><tr><th scope="rowgroup" colspan="{len(cells)}">{head}</th></tr>'
        f"<tr>{''.join(cells)}</tr></tbody>"
    )


def _cell(row: ImageRow, title: str, file: Path | None, *, css_class: str) -> str:
    image = None if file is None else _thumbnail(file)
    if image is None:
        return f'<td class="{css_class}"><span class="missing">none</span></td>'
    words = escape(", ".join(filter(None, (row.prompt or "no prompt", title, row.details))))
    small = ' class="pixels"' if max(image.width, image.height) <= PIXEL_ART_EDGE_PX else ""
    return (
        f'<td class="{css_class}"><img{small} alt="{words}" width="{image.width}" height="{image.height}" '
        f'decoding="async" src="{image.uri}"></td>'
    )


def _step_title(step: int) -> str:
    return f"step {step:,}"


def _left_out(every: Sequence[int], shown: Sequence[int], *, num_rows: int) -> str:
    missing = [step for step in every if step not in set(shown)]
    parts = []
    if missing:
        ranges = ", ".join(f"{step:,}" for step in missing)
        parts.append(
            f"{format_count(len(missing), 'validation')} left out to keep the page small: step {ranges}."
        )
    if num_rows:
        parts.append(f"{format_count(num_rows, 'prompt')} left out to keep the page small.")
    if parts:
        parts.append("Every picture lies in the run's folder validation/.")
    return note(" ".join(parts))


def image_rows(
    folder: Path, prompts: Sequence[dict[str, object]], *, compared_with: str | None
) -> list[ImageRow]:
    """The pictures that lie in a run's validation folder.

    `prompts` is what the run said about them when it began; without it, names of files say what is known.
    """
    by_step = {step: image_files(each) for step, each in validation_step_folders(folder)}
    if not prompts:
        base = {name: file.name for name, file in cached_image_files(folder).items()}
        names = sorted({name for files in by_step.values() for name in files} | set(base))
        prompts = [_prompt_of(name) | {"base": base.get(name)} for name in names]
    return [
        _row(folder, prompt, by_step, compared_with=compared_with or "compared with") for prompt in prompts
    ]


def _row(
    folder: Path, prompt: dict[str, object], by_step: dict[int, dict[str, Path]], *, compared_with: str
) -> ImageRow:
    name = str(prompt["name"])
    names = {"base model": prompt.get("base"), compared_with: prompt.get("other")}
    fixed = {title: folder / BASE_FOLDER / str(file) for title, file in names.items() if file}
    details = [
        str(prompt[key]) if key == "size" else f"{key} {prompt[key]}"
        for key in ("size", "seed")
        if key in prompt
    ]
    return ImageRow(
        prompt=str(prompt.get("prompt", "")),
        details=", ".join(details),
        fixed=tuple((title, file) for title, file in fixed.items() if file.exists()),
        by_step={step: files[name] for step, files in by_step.items() if name in files},
    )


def _prompt_of(name: str) -> dict[str, object]:
    return {"name": name, "prompt": name, **parse_image_name(name)}

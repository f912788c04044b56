"""Reference images of prompts: read, cut as training cuts them, and held for the whole run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

import xxhash
from PIL import Image

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.buckets import bucket_size, place
from simpletuner.helpers.data.images import decode_image, resize_and_crop
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.sampling.prompts import PromptSpec, Reference

ASPECT_DECIMALS = 2
"""Default of aspect_bucket_rounding."""


def with_references(
    prompts: Iterable[PromptSpec], *, alignment: int, fills_image: bool
) -> tuple[PromptSpec, ...]:
    """The prompts with the pixels of their reference images.

    Args:
        prompts: Those of a validation.
        alignment: Edges of references are multiples of this many pixels.
        fills_image: Cut each reference to the size of the prompt's image, as reference_strict does; else it
            keeps its aspect and has that size's area.

    Raises:
        DataError: A file cannot be read, or is no image that can be used.
    """
    decoded: dict[Path, tuple[Image.Image, bytes]] = {}
    cuts: dict[tuple[Path, Size], Reference] = {}

    def reference(file: Path, size: Size) -> Reference:
        if file not in decoded:
            decoded[file] = _decoded(file)
        image, data = decoded[file]
        target = size if fills_image else own_size(image, size, alignment=alignment)
        if (file, target) not in cuts:
            cuts[file, target] = _cut(image, data, target, name=file.name)
        return cuts[file, target]

    return tuple(
        replace(prompt, references=tuple(reference(file, prompt.size) for file in prompt.reference_files))
        for prompt in prompts
    )


def side_by_side(prompt: PromptSpec) -> Image.Image | None:
    """The reference images of a prompt in one row, no longer than its image; None without any."""
    references = prompt.references
    if not references:
        return None
    height = max(each.pixels.shape[1] for each in references)
    images = []
    for each in references:
        values = ((each.pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()  # [H, W, 3]
        image = Image.fromarray(values)
        images.append(image.resize((round(image.width * height / image.height), height)))
    row = Image.new("RGB", (sum(image.width for image in images), height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    row.thumbnail((max(prompt.size.width, prompt.size.height),) * 2)
    return row


def own_size(image: Image.Image, size: Size, *, alignment: int) -> Size:
    """The size with an image's aspect and the area of another one."""
    return bucket_size(
        Size(height=image.height, width=image.width),
        resolution=math.sqrt(size.height * size.width),
        resolution_type="pixel_area",
        alignment=alignment,
        aspect_decimals=ASPECT_DECIMALS,
    )


def _decoded(file: Path) -> tuple[Image.Image, bytes]:
    try:
        data = file.read_bytes()
        return decode_image(data), data
    except OSError as error:
        raise DataError(f"{file}: cannot read this reference image: {error.strerror}.") from error
    except DataError as error:
        raise DataError(f"{file}: not usable as a reference image: {error}. Give another file.") from error


def _cut(image: Image.Image, data: bytes, target: Size, *, name: str) -> Reference:
    image_px = Size(height=image.height, width=image.width)
    placement = place(image_px, target, style="center", rng=Random(0))
    pixels = resize_and_crop(
        image, placement.resized_px, top_left=placement.top_left, target_px=placement.target_px
    )
    return Reference(name=name, digest=f"{xxhash.xxh3_64_hexdigest(data)} {target}", pixels=pixels)

"""Arithmetic of aspect buckets, resizing and cropping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from simpletuner.helpers.configuration.schema.datasets import CropStyle, ResolutionType
from simpletuner.helpers.configuration.schema.resolution import nearest_multiple, target_area_px
from simpletuner.helpers.contracts import Size


@dataclass(frozen=True, slots=True)
class Placement:
    """The resized size of an image and its crop, in pixels."""

    resized_px: Size
    top_left: tuple[int, int]
    target_px: Size


def bucket_size(
    image_px: Size,
    *,
    resolution: float,
    resolution_type: ResolutionType,
    alignment: int,
    aspect_decimals: int,
) -> Size:
    """The bucket of an image's aspect at a resolution; width and height are multiples of `alignment`.

    The resolution is the shorter edge in pixels ("pixel"), an area in megapixels ("area"), or the edge in
    pixels of a square of the same area ("pixel_area"). The long edge over the short edge is rounded to
    `aspect_decimals`, so nearly equal aspects share a bucket, and a portrait's bucket is the transposed
    landscape's.
    """
    longer, shorter = max(image_px.height, image_px.width), min(image_px.height, image_px.width)
    aspect = round(longer / shorter, aspect_decimals)
    if resolution_type == "pixel":
        short = resolution
    else:
        short = math.sqrt(target_area_px(resolution, resolution_type) / aspect)
    long_px, short_px = (nearest_multiple(edge, alignment) for edge in (short * aspect, short))
    if image_px.height > image_px.width:
        return Size(height=long_px, width=short_px)
    return Size(height=short_px, width=long_px)


def is_too_small(image_px: Size, minimum: float, resolution_type: ResolutionType) -> bool:
    """Whether an image's shorter edge ("pixel") or area (other types) is below the minimum."""
    if resolution_type == "pixel":
        return min(image_px.height, image_px.width) < minimum
    return image_px.height * image_px.width < target_area_px(minimum, resolution_type)


def place(image_px: Size, target_px: Size, *, style: CropStyle, rng: Random) -> Placement:
    """Resize an image to the smallest size of its aspect that covers the target, and crop to the target."""
    scale = max(target_px.height / image_px.height, target_px.width / image_px.width)
    resized_px = Size(
        height=max(target_px.height, round(image_px.height * scale)),
        width=max(target_px.width, round(image_px.width * scale)),
    )
    spare = (resized_px.height - target_px.height, resized_px.width - target_px.width)
    if style == "random":
        top_left = (rng.randint(0, spare[0]), rng.randint(0, spare[1]))
    elif style == "center":
        top_left = (spare[0] // 2, spare[1] // 2)
    else:
        top_left = (0, 0)
    return Placement(resized_px=resized_px, top_left=top_left, target_px=target_px)

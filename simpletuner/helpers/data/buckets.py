"""Arithmetic of aspect buckets, resizing and cropping."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """Height and width of the resized size, top and left, height and width of the crop."""
        resized, target = self.resized_px, self.target_px
        return (resized.height, resized.width, *self.top_left, target.height, target.width)


def placement_of(numbers: Sequence[int]) -> Placement:
    """The placement of these `numbers`."""
    height, width, top, left, target_height, target_width = numbers
    return Placement(Size(height, width), (top, left), Size(target_height, target_width))


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
    elongation = round(longer / shorter, aspect_decimals)
    short_px, long_px = _edges(
        elongation, resolution=resolution, resolution_type=resolution_type, alignment=alignment
    )
    if image_px.height > image_px.width:
        return Size(height=long_px, width=short_px)
    return Size(height=short_px, width=long_px)


def aspect_size(aspect: float, *, resolution: float, resolution_type: ResolutionType, alignment: int) -> Size:
    """The bucket of an aspect, width / height, at a resolution; as `bucket_size`, with no rounding of it."""
    short_px, long_px = _edges(
        max(aspect, 1 / aspect), resolution=resolution, resolution_type=resolution_type, alignment=alignment
    )
    return Size(long_px, short_px) if aspect < 1 else Size(short_px, long_px)


def _edges(
    elongation: float, *, resolution: float, resolution_type: ResolutionType, alignment: int
) -> tuple[int, int]:
    """The short and the long edge of a bucket, in pixels."""
    if resolution_type == "pixel":
        short = resolution
    else:
        short = math.sqrt(target_area_px(resolution, resolution_type) / elongation)
    return nearest_multiple(short, alignment), nearest_multiple(short * elongation, alignment)


def scale_to(size: float, image_px: Size, resolution_type: ResolutionType) -> float:
    """The factor that brings an image's shorter edge ("pixel") or area (other types) to a size."""
    if resolution_type == "pixel":
        return size / min(image_px.height, image_px.width)
    return math.sqrt(target_area_px(size, resolution_type) / (image_px.height * image_px.width))


def is_too_small(image_px: Size, minimum: float, resolution_type: ResolutionType) -> bool:
    """Whether an image's shorter edge ("pixel") or area (other types) is below the minimum."""
    if resolution_type == "pixel":
        return min(image_px.height, image_px.width) < minimum
    return image_px.height * image_px.width < target_area_px(minimum, resolution_type)


def enlargement(image_px: Size, target_px: Size) -> float:
    """The factor that brings an image to the smallest size that covers the target; above 1 enlarges it."""
    return max(target_px.height / image_px.height, target_px.width / image_px.width)


def place(
    image_px: Size, target_px: Size, *, style: CropStyle, rng: Random, least_scale: float = 0.0
) -> Placement:
    """Resize an image, its aspect kept, and crop it to the target.

    Args:
        image_px: Of the image.
        target_px: Of the crop.
        style: Position of the crop.
        rng: Draws the position with style "random".
        least_scale: Resize by this factor if the image then covers the target, else to the smallest size that
            does.
    """
    scale = max(enlargement(image_px, target_px), least_scale)
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

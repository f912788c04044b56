"""Makes references of cut images.

Shapes: H W image height and width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from simpletuner.helpers.configuration.schema.made_references import (
    Canny,
    Depth,
    JpegArtifacts,
    MadeReference,
    MaskShape,
    RandomMasks,
    Superresolution,
)

Generator = np.random.Generator
_SMALLEST, _LARGEST = 0.05, 0.4
"""Size of a shape of random_masks, as a part of the shorter edge."""
_MOST_SHAPES = 200
_NEIGHBOURS = {0: (0, 1), 1: (1, 1), 2: (1, 0), 3: (1, -1)}
"""(down, right) of the next pixel along a gradient, by its direction in eighths of a turn from the right."""


class DepthEstimator(Protocol):
    """Models that estimate depth, by their folders."""

    def identity(self, folder: Path) -> str:
        """Text that changes with the model's files."""

    def estimate(self, image: Image.Image, folder: Path) -> Image.Image:
        """The depth of an RGB image as an RGB image of its size."""

    def unload(self) -> None:
        """Free the models."""


def make_reference(
    image: Image.Image, made: MadeReference, *, seed: int, depth: DepthEstimator | None = None
) -> Image.Image:
    """An RGB image of the same size, made of a cut RGB image; the same for the same arguments.

    Args:
        image: The cut image.
        made: How it is made.
        seed: Of what is drawn.
        depth: Estimates depth; None if nothing needs it.
    """
    if isinstance(made, Depth):
        assert depth is not None, "a reference of depth needs an estimator"
        return depth.estimate(image, made.model)
    rng = np.random.Generator(np.random.Philox(key=seed))
    return _MAKERS[type(made)](image, made, rng)


def _canny(image: Image.Image, made: Canny, rng: Generator) -> Image.Image:
    """Edges: local maxima of the gradient along it, above one threshold and joined to some above another.

    Source: Canny 1986, A computational approach to edge detection; without smoothing before it, and with
    the sum of the two gradients as their size.
    """
    from scipy import ndimage  # here, because validate makes no images

    grey = np.asarray(image.convert("L"), dtype=np.float32)  # [H, W]
    down, right = (ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (0, 1))
    size = np.abs(down) + np.abs(right)
    direction = np.round(np.arctan2(down, right) / (math.pi / 4)).astype(int) % 4
    is_top = np.zeros(size.shape, dtype=bool)
    around = np.pad(size, 1)
    height, width = size.shape
    for eighth, (y, x) in _NEIGHBOURS.items():
        after = around[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        before = around[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        is_above = size > after if x and y else size >= after  # OpenCV's rule for equal neighbours
        is_top |= (direction == eighth) & (size > before) & is_above
    parts, _ = ndimage.label(is_top & (size > made.low_threshold), structure=np.ones((3, 3)))
    strong = np.unique(parts[is_top & (size > made.high_threshold)])
    edges = np.isin(parts, strong[strong > 0])
    return Image.fromarray((edges * 255).astype(np.uint8)).convert("RGB")


def _superresolution(image: Image.Image, made: Superresolution, rng: Generator) -> Image.Image:
    if made.downscale_factor > 1:
        smaller = [max(1, round(edge / made.downscale_factor)) for edge in image.size]
        small = image.resize((smaller[0], smaller[1]), Image.Resampling.BILINEAR)
        image = small.resize(image.size, Image.Resampling.BILINEAR)
    radius = made.blur_radius * (0.7 if made.blur_type == "both" else 1.0)
    if made.blur_type in ("box", "both"):
        image = image.filter(ImageFilter.BoxBlur(radius))
    if made.blur_type in ("gaussian", "both"):
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if made.is_random:
        values = np.asarray(image, dtype=np.float32)  # [H, W, 3]
        noise = rng.standard_normal(values.shape, dtype=np.float32) * (255 * made.noise_level)
        image = Image.fromarray(np.round(values + noise).clip(0, 255).astype(np.uint8))
    return image if made.jpeg_quality is None else _stored(image, made.jpeg_quality)


def _jpeg_artifacts(image: Image.Image, made: JpegArtifacts, rng: Generator) -> Image.Image:
    least, largest = made.quality_range
    quality = {
        "fixed": lambda: made.quality,
        "range": lambda: int(rng.integers(least, largest + 1)),
        "random": lambda: made.quality_list[int(rng.integers(len(made.quality_list)))],
    }[made.quality_mode]()
    for turn in range(made.compression_rounds):
        image = _stored(image, max(1, int(quality * made.round_quality_decay**turn)))
    return image


def _stored(image: Image.Image, quality: int) -> Image.Image:
    """The image as a JPEG holds it."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _random_masks(image: Image.Image, made: RandomMasks, rng: Generator) -> Image.Image:
    wanted = rng.uniform(made.min_coverage, made.max_coverage)
    mask = Image.new("L", image.size, 0)
    for _ in range(_MOST_SHAPES):
        if _coverage(mask) >= wanted:
            break
        larger = mask.copy()
        shape = made.mask_types[int(rng.integers(len(made.mask_types)))]
        _draw(ImageDraw.Draw(larger), shape, rng=rng, size=image.size)
        if _coverage(larger) <= made.max_coverage:
            mask = larger
    if made.invert_mask:
        mask = mask.point(lambda value: 255 - value)
    if made.output_mode == "mask":
        return mask.convert("RGB")
    return Image.composite(Image.new("RGB", image.size, (255, 255, 255)), image, mask)


def _coverage(mask: Image.Image) -> float:
    return float(np.mean(np.asarray(mask) > 0))


def _draw(draw: ImageDraw.ImageDraw, shape: MaskShape, *, rng: Generator, size: tuple[int, int]) -> None:
    """Draw a white shape of random size at a random place."""
    width, height = size
    edge = min(size)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    reach_x, reach_y = rng.uniform(_SMALLEST, _LARGEST, size=2) * edge / 2
    if shape == "rectangle":
        draw.rectangle((x - reach_x, y - reach_y, x + reach_x, y + reach_y), fill=255)
    elif shape == "circle":
        draw.ellipse((x - reach_x, y - reach_x, x + reach_x, y + reach_x), fill=255)
    elif shape == "irregular":
        corners = rng.integers(5, 13)
        angles = np.sort(rng.uniform(0, 2 * math.pi, size=corners))
        far = rng.uniform(0.5, 1, size=corners) * reach_x
        draw.polygon(list(zip(x + far * np.cos(angles), y + far * np.sin(angles), strict=True)), fill=255)
    else:
        steps: npt.NDArray[np.float64] = rng.normal(0, edge / 10, size=(int(rng.integers(3, 9)), 2))
        points = np.cumsum(np.vstack([[x, y], steps]), axis=0)
        thick = max(1, round(reach_y / 2))
        draw.line([(float(a), float(b)) for a, b in points], fill=255, width=thick, joint="curve")


_MAKERS: Mapping[type[MadeReference], Callable[[Image.Image, Any, Generator], Image.Image]] = {
    Canny: _canny,
    Superresolution: _superresolution,
    JpegArtifacts: _jpeg_artifacts,
    RandomMasks: _random_masks,
}

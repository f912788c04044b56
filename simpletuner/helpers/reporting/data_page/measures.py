"""What the pixels of a planned image show: thumbnails, sharpness, and hashes that find the same image twice.

Shapes: H W image height and width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from simpletuner.helpers.configuration.schema.made_references import Depth
from simpletuner.helpers.configuration.schema.masks import MaskConfig
from simpletuner.helpers.data.index import read_unchanged
from simpletuner.helpers.data.masks import BLANK, is_blank, mask_cells
from simpletuner.helpers.data.pixels import load_image, planned_cut
from simpletuner.helpers.data.planned import PlannedImage, PlannedMask
from simpletuner.helpers.data.references import PlannedReference
from simpletuner.helpers.errors import DamagedImageError, DataError, TrainingError
from simpletuner.helpers.io.names import printable

THUMBNAIL_PX = 160
"""Longest edge."""
_QUALITY = 80
HASH_BITS = 64
_HASH_EDGE = 8
_GREY_EDGE_PX = 32
FLATTEST = 4.0
"""Standard deviation of grey values, of 255. A flatter image has no look that a hash could hold."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small JPEG."""

    title: str
    """What it shows: image, mask, or the entry of a reference."""
    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What the pixels of one image show."""

    thumbnails: tuple[Thumbnail, ...]
    """Of its cut, its mask and its references."""
    pixels: str
    """Digest of its decoded pixels."""
    look: int | None
    """Perceptual hash of the whole image; None if it is too flat to have one."""
    sharpness: float
    """Variance of the Laplacian of the cut's grey values, 0 to 255."""
    contrast: float
    """Standard deviation of the cut's grey values, 0 to 255."""
    mask_problem: str | None
    """The reason if its mask leaves nothing to learn."""


def measure(image: PlannedImage, masks: MaskConfig) -> Measures | str:
    """The measures of an image at its training size, or the reason why its pixels cannot be used.

    Args:
        image: The image.
        masks: How masks weight the loss.
    """
    try:
        whole = load_image(image)
        cut = planned_cut(whole, image)
        extras, blank = [], False
        if image.mask is not None:
            cells = _mask_cells(image, image.mask)
            blank = is_blank(cells, image.mask.kind, masks)
            mask = Image.fromarray(np.round(cells * 255).astype(np.uint8)).convert("RGB")
            extras.append(_thumbnail("mask", mask.resize(cut.size, Image.Resampling.NEAREST)))
        extras += _references(image)
    except (DataError, TrainingError) as error:
        return str(error)
    grey = np.asarray(cut.convert("L"))  # [H, W]
    return Measures(
        thumbnails=(_thumbnail("image", cut), *extras),
        pixels=xxhash.xxh3_128_hexdigest(f"{whole.size}".encode() + whole.tobytes()),
        look=perceptual_hash(whole),
        sharpness=laplacian_variance(grey),
        contrast=float(grey.std(dtype=np.float64)),
        mask_problem=BLANK if blank else None,
    )


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits, of which few differ between an image and its copy at another size or quality; None if flat.

    Bit k says whether the k-th of the 64 lowest frequencies of a small grey copy is above their median. The
    first is the mean brightness, always above.

    Source: Zauner 2010, Implementation and benchmarking of perceptual image hash functions, DCT hash.
    """
    small = image.resize((_GREY_EDGE_PX, _GREY_EDGE_PX), Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small.convert("L"), dtype=np.float64)
    if grey.std() < FLATTEST:
        return None
    angles = np.outer(np.arange(_HASH_EDGE), np.arange(_GREY_EDGE_PX) + 0.5) * (math.pi / _GREY_EDGE_PX)
    cosines = np.cos(angles)  # [8, 32], the DCT-II's lowest frequencies
    frequencies = (cosines @ grey @ cosines.T).ravel()
    is_high = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(is_high).tobytes(), "big")


def laplacian_variance(grey: npt.NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of [H, W] grey values; low where nothing is sharp.

    Source: Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy.
    """
    values = grey.astype(np.int16)
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((around - 4 * values[1:-1, 1:-1]).astype(np.float32).var(dtype=np.float64))


def _mask_cells(image: PlannedImage, mask: PlannedMask) -> npt.NDArray[np.float64]:
    try:
        return mask_cells(read_unchanged(mask.file, mask.digest), image.sample, kind=mask.kind)
    except DataError as error:
        raise DataError(f"its mask {printable(mask.file.name)} cannot be used: {error}") from error


def _references(image: PlannedImage) -> Iterator[Thumbnail]:
    for reference in image.references:
        if isinstance(reference.making, Depth):
            continue  # it needs a model
        yield _thumbnail(reference.entry, _reference(reference))


def _reference(reference: PlannedReference) -> Image.Image:
    try:
        return planned_cut(load_image(reference), reference)
    except DamagedImageError as error:
        raise DataError(f"its reference {reference.sample.path} cannot be used: {error}") from error


def _thumbnail(title: str, image: Image.Image) -> Thumbnail:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return Thumbnail(title, buffer.getvalue(), small.width, small.height)

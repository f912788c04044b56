"""Image files to pixels. Files are untrusted: the header's size is checked before anything is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.colour import has_new_colours, to_plain_values, to_srgb
from simpletuner.helpers.data.damage import load_strictly, png_chunks
from simpletuner.helpers.data.optional_formats import missing_decoder, optional_formats
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

if TYPE_CHECKING:
    from torch import Tensor

# 64 Mi pixels are 192 MiB as RGB: more than a 60-megapixel camera gives, and small beside a model.
MAX_PIXELS = 64 << 20
MAX_EDGE_PX = 32768
MAX_ASPECT = 32

# Formats whose decoders are maintained and bounded; no EPS (runs Ghostscript), no PSD, no ICNS.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# Pillow's decoders raise these on damaged files.
_DECODER_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
)
_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = frozenset({5, 6, 7, 8})


def inspect_image(data: bytes) -> Size:
    """Read the size from the header, EXIF orientation applied; the pixels may still turn out to be damaged.

    Raises:
        DataError: The image cannot be used; the message does not name the file.
    """
    with warnings.catch_warnings():
        # Pillow warns of damaged metadata, and of sizes above its own limit, which is above ours.
        warnings.simplefilter("ignore")
        image = _opened_still(data)
        if image.format == "PNG" and _has_late_metadata(data):
            image = decode_image(data)
            return Size(height=image.height, width=image.width)
        # Pillow has already turned the size of a TIFF. Its reader of a PNG's orientation decodes the pixels.
        is_turned = image.format != "TIFF" and _orientation(image, Image.Image.getexif) in _TURNED
    height, width = (image.width, image.height) if is_turned else (image.height, image.width)
    return Size(height=height, width=width)


def is_read_anew(data: bytes) -> bool:
    """Whether earlier versions read other pixels from this image, which inspect_image has accepted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return has_new_colours(_opened(data))


def decode_image(data: bytes) -> Image.Image:
    """Decode a still image to 8-bit sRGB: orientation applied, alpha over white, embedded profile converted.

    Raises:
        DataError: The image cannot be used; the message does not name the file.
        MemoryError: Its pixels do not fit into memory.
    """
    return _decoded(data, to_srgb)


def decode_values(data: bytes) -> Image.Image:
    """Decode a still image that holds no colours but numbers, such as a mask: RGBA, orientation applied.

    Raises:
        DataError: The image cannot be used; the message does not name the file.
        MemoryError: Its pixels do not fit into memory.
    """
    return _decoded(data, to_plain_values)


def _decoded(data: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    image = _opened_still(data)
    try:
        loaded = load_strictly(image, data)
        orientation = _orientation(
            image, type(image).getexif
        )  # after loading: the TIFF decoder rotates and resets the tag
        converted = convert(loaded)
        transpose = _TRANSPOSES.get(orientation)
        return converted if transpose is None else converted.transpose(transpose)
    except _DECODER_FAULTS as error:
        raise DataError(f"it is damaged or cut off: {_described(error)}") from error


def resize_and_crop(
    image: Image.Image, resized_px: Size, *, top_left: tuple[int, int], target_px: Size
) -> Tensor:
    """Resize with Lanczos and crop to [3, H, W] float32 in [-1, 1]."""
    return as_pixels(cut(image, resized_px, top_left=top_left, target_px=target_px))


def cut(image: Image.Image, resized_px: Size, *, top_left: tuple[int, int], target_px: Size) -> Image.Image:
    """Resize with Lanczos and crop."""
    top, left = top_left
    assert top + target_px.height <= resized_px.height, "the crop leaves the resized image"
    assert left + target_px.width <= resized_px.width, "the crop leaves the resized image"
    resized = image.resize((resized_px.width, resized_px.height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + target_px.width, top + target_px.height))


def as_pixels(image: Image.Image) -> Tensor:
    """An RGB image as [3, H, W] float32 in [-1, 1]."""
    import torch  # here, because validate reads headers without torch

    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W, 3], 0 to 255
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def _opened_still(data: bytes) -> Image.Image:
    """The image with its header read."""
    image = _opened(data)
    _check_size(image)
    _check_still(image, data)
    return image


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise DataError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=(*_FORMATS, *optional_formats()))
    except Image.DecompressionBombError as error:
        raise DataError(f"it has more than the allowed {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise DataError(missing_decoder(data) or _not_an_image(data)) from error
    except _DECODER_FAULTS as error:
        raise DataError(f"its header is damaged: {_described(error)}") from error


def _not_an_image(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        return "it holds a web page or XML text under an image's name"
    return f"its content is none of {', '.join(_FORMATS)} (it begins with {data[:8].hex(' ')})"


def _check_size(image: Image.Image) -> None:
    """Check the size in the header, before decoding.

    Raises:
        DataError: The image is too large or too elongated.
    """
    width, height = image.size
    size = f"{width}x{height} px"
    if width < 1 or height < 1:
        raise DataError(f"{size} is no size")
    if width * height > MAX_PIXELS:
        raise DataError(f"{size} is over the allowed {MAX_PIXELS} pixels; scale it down")
    if max(width, height) > MAX_EDGE_PX:
        raise DataError(f"{size} has an edge over the allowed {MAX_EDGE_PX} px; scale it down or crop it")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{size} is more elongated than the allowed {MAX_ASPECT}:1; crop it")


def _check_still(image: Image.Image, data: bytes) -> None:
    # An MPO is a JPEG with previews or a second view beside its main image, as a HEIF file may have.
    if image.format in ("JPEG", "MPO", "BMP", "HEIF"):
        return
    try:
        _opened(data).seek(1)  # a second handle, because seek(1) changes the current frame
    except EOFError:
        return
    except _DECODER_FAULTS as error:
        raise DataError(f"it is damaged or cut off: {_described(error)}") from error
    raise DataError("it is animated or has several pages; save one of them as a still image")


def _has_late_metadata(data: bytes) -> bool:
    """Whether a PNG has chunks between its pixels and its end: EXIF data or XMP may stand there."""
    kinds = [kind for kind, _, _ in png_chunks(data)]
    return any(after not in (b"IDAT", b"IEND") for kind, after in pairwise(kinds) if kind == b"IDAT")


def _orientation(image: Image.Image, read_exif: Callable[[Any], Image.Exif]) -> int:
    """EXIF orientation 1 to 8; 1 if the EXIF data is missing or damaged."""
    try:
        value = read_exif(image).get(_ORIENTATION_TAG, 1)
    except _DECODER_FAULTS:
        return 1
    return value if isinstance(value, int) else 1


def _described(error: Exception) -> str:
    return printable(str(error))[:200] or type(error).__name__

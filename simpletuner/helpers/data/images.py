"""Image files to pixels. Files are untrusted: the header's size is checked before anything is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.optional_formats import missing_decoder, optional_formats
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

# 64 Mi pixels are 192 MiB as RGB: more than a 60-megapixel camera gives, and small beside a model.
MAX_PIXELS = 64 << 20
MAX_EDGE_PX = 32768
MAX_ASPECT = 32
MAX_ICC_BYTES = 4 << 20

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
_ALPHA_MODES = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_16_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})


def inspect_image(data: bytes) -> Size:
    """Decode a whole image; returns its size, EXIF orientation applied.

    Raises:
        DataError: The image cannot be used; the message does not name the file.
    """
    with warnings.catch_warnings():
        # Pillow warns of damaged metadata, and of sizes above its own limit, which is above ours.
        warnings.simplefilter("ignore")
        image = decode_image(data)
    return Size(height=image.height, width=image.width)


def decode_image(data: bytes) -> Image.Image:
    """Decode a still image to 8-bit sRGB: orientation applied, alpha over white, embedded profile converted.

    Raises:
        DataError: The image cannot be used; the message does not name the file.
    """
    image = _opened(data)
    _check_size(image)
    _check_still(image, data)
    profile = image.info.get("icc_profile")
    try:
        image.load()
        orientation = _orientation(image)  # after load(): the TIFF decoder rotates and resets the tag
        rgb = _to_srgb(_to_rgb(image), profile if image.mode in ("RGB", "RGBA") else None)
        transpose = _TRANSPOSES.get(orientation)
        return rgb if transpose is None else rgb.transpose(transpose)
    except MemoryError as error:
        raise DataError(f"{image.width}x{image.height} px do not fit into memory") from error
    except _DECODER_FAULTS as error:
        raise DataError(f"it is damaged or cut off: {_described(error)}") from error


def resize_and_crop(
    image: Image.Image, resized_px: Size, *, top_left: tuple[int, int], target_px: Size
) -> Tensor:
    """Resize with Lanczos and crop to [3, H, W] float32 in [-1, 1]."""
    top, left = top_left
    assert top + target_px.height <= resized_px.height, "the crop leaves the resized image"
    assert left + target_px.width <= resized_px.width, "the crop leaves the resized image"
    resized = image.resize((resized_px.width, resized_px.height), Image.Resampling.LANCZOS)
    cropped = resized.crop((left, top, left + target_px.width, top + target_px.height))
    pixels = torch.from_numpy(np.array(cropped, dtype=np.float32))  # [H, W, 3], 0 to 255
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 if the EXIF data is missing or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_FAULTS:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _16_BIT_MODES or image.mode in ("I", "F"):
        return _from_deep_grey(image).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    if image.mode == "CMYK":
        return _to_srgb(image, image.info.get("icc_profile"))
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to 8 bits; Pillow's own conversion would clip it."""
    if image.mode == "F":
        raise DataError("its pixels are floating point numbers of unknown range; save it with 8 or 16 bits")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image converted by its profile; a missing or damaged profile counts as sRGB."""
    converted = None
    if profile and len(profile) <= MAX_ICC_BYTES:
        with suppress(ImageCms.PyCMSError, *_DECODER_FAULTS):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    if converted is not None:
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _described(error: Exception) -> str:
    return printable(str(error))[:200] or type(error).__name__

"""Decoded pixels of any mode to 8-bit sRGB: profile applied, alpha over white."""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, TiffImagePlugin

from simpletuner.helpers.errors import DataError

MAX_ICC_BYTES = 4 << 20

_GREY_MODES = frozenset({"1", "L", "LA", "La"})
_ALPHA_MODES = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_DEEP_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I"})
_GREY_LEVELS = {"L": 256, "I;16": 65536}
# The modes in which LittleCMS takes pixels.
_CMS_MODES = frozenset({*_GREY_LEVELS, "RGB", "CMYK"})
_SRGB = ImageCms.createProfile("sRGB")
_TIFF_BITS, _TIFF_ZERO_MEANS = 258, 262
_TIFF_WHITE = 0
_ROUNDING = 1  # of 255
_CUBE_LEVELS = range(0, 256, 51)


def to_srgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; a missing or damaged profile, or one of another colour space, counts as sRGB.

    Raises:
        DataError: The range of its values is unknown.
    """
    profile = image.info.get("icc_profile")
    _refuse_float(image)
    if image.mode in _DEEP_MODES:
        return _converted(_in_16_bits(image), profile)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _over_white(image, profile)
    if image.mode == "1":
        return image.convert("RGB")
    return _converted(image if image.mode in _CMS_MODES else image.convert("RGB"), profile)


def to_plain_values(image: Image.Image) -> Image.Image:
    """The image in mode RGBA with its values as they are stored: no profile, and nothing mixed with alpha.

    Raises:
        DataError: The range of its values is unknown.
    """
    _refuse_float(image)
    return (_without_profile(_in_16_bits(image)) if image.mode in _DEEP_MODES else image).convert("RGBA")


def _refuse_float(image: Image.Image) -> None:
    if image.mode == "F":
        raise DataError("its pixels are floating point numbers of unknown range; save it with 8 or 16 bits")


def has_new_colours(image: Image.Image) -> bool:
    """Whether earlier versions read other colours from a file with this header: their latents are stale.

    They took a profile for sRGB by its name, ignored it but for RGB, RGBA and CMYK, applied it to RGBA after
    white was mixed in, and took the values of every grey TIFF for 16 bits whose zero is black.
    """
    profile = image.info.get("icc_profile", b"")
    if image.mode == "CMYK":
        return False
    grey_mode = "I;16" if image.mode in _DEEP_MODES else "L" if image.mode in _GREY_MODES else None
    is_converted = _transform(profile, "RGB") is not None or (
        grey_mode is not None and _grey_table(profile, grey_mode) is not None
    )
    if not is_converted:
        return image.mode in _DEEP_MODES and _has_unusual_range(image)
    return image.mode != "RGB" or _was_taken_for_srgb(profile)


def _has_unusual_range(image: Image.Image) -> bool:
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    return tags.get(_TIFF_ZERO_MEANS) == _TIFF_WHITE or tags.get(_TIFF_BITS, (16,))[0] == 12


def _was_taken_for_srgb(profile: bytes) -> bool:
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except ImageCms.PyCMSError:
        return True
    return "srgb" in name.lower()


def _over_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    with_alpha = image.convert("RGBA")
    is_grey = image.mode in _GREY_MODES
    opaque = _converted(with_alpha.getchannel("R") if is_grey else with_alpha.convert("RGB"), profile)
    opaque.putalpha(with_alpha.getchannel("A"))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, opaque).convert("RGB")


def _in_16_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as unsigned numbers whose 65535 is white."""
    values, white = np.asarray(image).astype(np.int64), 65535
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.mode != "I":
            white = (1 << image.tag_v2[_TIFF_BITS][0]) - 1  # 12 bits are stored as they are
        if image.tag_v2.get(_TIFF_ZERO_MEANS) == _TIFF_WHITE:
            values = white - values
    if values.min() < 0 or values.max() > white:
        raise DataError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits")
    return Image.fromarray(((values * 65535 + white // 2) // white).astype(np.uint16))


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The opaque image in sRGB; its mode is one of LittleCMS's."""
    if profile and image.mode in _GREY_LEVELS:
        table = _grey_table(profile, image.mode)
        if table is not None:
            return Image.fromarray(table[np.asarray(image)])
        # Programs write profiles of RGB into grey images too: red, green and blue are equal.
        image = _without_profile(image)
    transform = _transform(profile, image.mode) if profile else None
    return _without_profile(image) if transform is None else _applied(transform, image)


def _without_profile(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=8)
def _grey_table(profile: bytes, mode: str) -> npt.NDArray[np.uint8] | None:
    """The [levels, 3] sRGB of each grey; None for a profile that is damaged, unfit or without effect."""
    levels = _GREY_LEVELS[mode]
    ramp = np.arange(levels)[None]
    # Optimised, LittleCMS interpolates dark greys: 6 in place of 13 for the first step of linear light.
    transform = _built(profile, mode, ImageCms.Flags.NOOPTIMIZE)
    if transform is None:
        return None
    greys = Image.fromarray(ramp.astype(np.uint8 if mode == "L" else np.uint16))
    table = np.asarray(_applied(transform, greys))[0]
    unchanged = np.rint(ramp.T * (255 / (levels - 1)))
    return table if _differ(table, unchanged) else None


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of RGB or CMYK; None for a profile that is damaged, unfit or without effect."""
    transform = _built(profile, mode, ImageCms.Flags.NONE)
    if transform is None or mode == "CMYK":
        return transform
    greys = np.arange(256).repeat(3).reshape(-1, 3)
    cube = np.stack(np.meshgrid(*[_CUBE_LEVELS] * 3), axis=-1).reshape(-1, 3)
    probe = np.concatenate([greys, cube]).astype(np.uint8)
    converted = np.asarray(_applied(transform, Image.fromarray(probe[None])))[0]
    return transform if _differ(converted, probe) else None


def _built(profile: bytes, mode: str, flags: ImageCms.Flags) -> ImageCms.ImageCmsTransform | None:
    if len(profile) > MAX_ICC_BYTES:
        return None
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError, struct.error):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, _SRGB, mode, "RGB", flags=flags)
    return None


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "only a conversion in place returns None"
    return converted


def _differ(converted: npt.NDArray[np.uint8], original: npt.NDArray[Any]) -> bool:
    """Whether values differ by more than rounding: this decides, and not the profile's name."""
    return bool(np.abs(converted - original.astype(np.float64)).max() > _ROUNDING)

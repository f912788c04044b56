"""Every profile is applied by its content; every expected value is a formula's."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from simpletuner.helpers.data.colour import MAX_ICC_BYTES
from simpletuner.helpers.data.images import decode_image
from tests.unit.data.icc_profiles import (
    ADOBE_PRIMARIES,
    P3_PRIMARIES,
    SRGB_PRIMARIES,
    cmyk_profile,
    icc_profile,
    srgb_encoded,
    srgb_light,
    to_xyz,
)
from tests.unit.data.image_samples import encoded, tiff

VALUES = np.array([[0, 1, 20, 55, 128, 200, 254, 255]], dtype=np.uint8)
LINEAR_NAMED_SRGB = {"gamma": 1.0, "name": "sRGB IEC61966-2.1 linear"}


def values_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def in_mode(mode: str) -> Image.Image:
    """Grey values in a mode."""
    if mode == "I;16":
        return Image.fromarray(VALUES.astype(np.uint16) * 257)
    return Image.fromarray(VALUES).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.reliability_row(13)
def test_a_linear_profile_is_applied_whatever_its_name_says(mode: str, version: int) -> None:
    space = "RGB" if mode in ("RGB", "RGBA", "P") else "GRAY"
    profile = icc_profile(space, **LINEAR_NAMED_SRGB, version=version)
    decoded = decode_image(encoded(in_mode(mode), "PNG", icc_profile=profile))
    expected = srgb_encoded(VALUES / 255)[..., None]
    assert round(float(expected[0, 3, 0])) == 128  # of 55
    assert np.abs(values_of(decoded) - expected).max() <= 1


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.reliability_row(13)
def test_a_profile_is_applied_in_every_format_that_holds_one(file_format: str, mode: str) -> None:
    # WebP has no grey, and there and in AVIF Pillow's encoder stores RGB.
    space = "GRAY" if mode == "L" and file_format not in ("WEBP", "AVIF") else "RGB"
    data = encoded(
        Image.new(mode, (64, 64), "#373737"), file_format, icc_profile=icc_profile(space, **LINEAR_NAMED_SRGB)
    )
    assert np.abs(values_of(decode_image(data)) - 128).max() <= 2


@pytest.mark.parametrize("gamma", [1.8, 2.2, 2.4])
def test_a_grey_image_follows_the_curve_of_its_profile(gamma: float) -> None:
    data = encoded(in_mode("L"), "PNG", icc_profile=icc_profile("GRAY", gamma=gamma))
    expected = srgb_encoded((VALUES / 255) ** gamma)[..., None]
    assert np.abs(values_of(decode_image(data)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["sRGB", "Camera"])
def test_a_profile_that_means_srgb_changes_no_value_whatever_its_name(mode: str, name: str) -> None:
    space = "GRAY" if mode == "L" else "RGB"
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    profile = icc_profile(space, gamma=srgb_light, name=name)
    assert np.array_equal(
        values_of(decode_image(encoded(image, "PNG", icc_profile=profile))), values_of(image.convert("RGB"))
    )


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profile_that_is_half_a_step_off_srgb_changes_no_value(mode: str) -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(8, axis=0)).convert(mode)

    def half_a_step_lighter(value: np.ndarray) -> np.ndarray:
        return srgb_light(np.clip(value + 0.6 / 255, 0, 1))

    profile = icc_profile("GRAY" if mode == "L" else "RGB", gamma=half_a_step_lighter)
    decoded = decode_image(encoded(image, "PNG", icc_profile=profile))
    assert np.array_equal(values_of(decoded), values_of(image.convert("RGB")))


@pytest.mark.parametrize(
    ("primaries", "gamma", "decode"),
    [
        (P3_PRIMARIES, srgb_light, srgb_light),
        (ADOBE_PRIMARIES, 563 / 256, lambda value: value ** (563 / 256)),
    ],
    ids=["Display P3", "Adobe RGB"],
)
def test_wide_gamut_colours_become_the_same_colours_of_srgb(
    primaries: tuple[tuple[float, float], ...], gamma: object, decode: object
) -> None:
    colours = np.array([[[128, 128, 128], [150, 120, 90], [90, 140, 110], [100, 110, 160], [255, 0, 0]]])
    data = encoded(
        Image.fromarray(colours.astype(np.uint8)),
        "PNG",
        icc_profile=icc_profile("RGB", gamma=gamma, primaries=primaries, name="sRGB"),
    )
    light = decode(colours / 255) @ to_xyz(primaries).T @ np.linalg.inv(to_xyz(SRGB_PRIMARIES)).T
    assert np.abs(values_of(decode_image(data)) - srgb_encoded(light)).max() <= 2


def test_primaries_alone_are_reason_enough_to_convert() -> None:
    profile = icc_profile("RGB", gamma=srgb_light, primaries=P3_PRIMARIES, name="sRGB")
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    red = Image.new("RGB", (4, 4), (200, 50, 50))
    assert decode_image(encoded(grey, "PNG", icc_profile=profile)).getpixel((0, 0)) == (128, 128, 128)
    assert decode_image(encoded(red, "PNG", icc_profile=profile)).getpixel((0, 0)) != (200, 50, 50)


def test_dark_greys_of_16_linear_bits_keep_their_steps() -> None:
    deep = np.array([[0, 50, 100, 200, 400]], dtype=np.uint16)
    data = encoded(Image.fromarray(deep), "PNG", icc_profile=icc_profile("GRAY", gamma=1.0))
    expected = srgb_encoded(deep / 65535)
    assert len(set(np.round(expected[0]))) == 5
    assert np.abs(values_of(decode_image(data))[..., 0] - expected).max() <= 1


def test_a_profile_is_applied_before_a_half_clear_colour_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (55, 55, 55, 128))
    data = encoded(clear, "PNG", icc_profile=icc_profile("RGB", **LINEAR_NAMED_SRGB))
    share = 128 / 255
    expected = share * srgb_encoded(55 / 255) + (1 - share) * 255
    assert abs(decode_image(data).getpixel((0, 0))[0] - expected) <= 1


def test_a_grey_image_with_a_profile_of_rgb_is_read_as_equal_red_green_and_blue() -> None:
    data = encoded(in_mode("L"), "PNG", icc_profile=icc_profile("RGB", **LINEAR_NAMED_SRGB))
    assert np.abs(values_of(decode_image(data)) - srgb_encoded(VALUES / 255)[..., None]).max() <= 1


@pytest.mark.parametrize(
    "profile",
    [
        icc_profile("GRAY", gamma=1.0),
        cmyk_profile(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
        icc_profile("RGB", gamma=1.0)[:200],
        b"no profile at all",
        b"",
    ],
    ids=["grey", "inks", "Lab", "cut off", "no profile", "empty"],
)
def test_a_profile_that_cannot_be_of_these_pixels_counts_as_srgb(profile: bytes) -> None:
    data = encoded(in_mode("RGB"), "PNG", icc_profile=profile)
    assert np.array_equal(values_of(decode_image(data))[..., 0], VALUES)


def test_a_profile_of_more_than_4_mib_counts_as_srgb() -> None:
    profile = icc_profile("RGB", gamma=1.0) + bytes(MAX_ICC_BYTES)
    data = encoded(in_mode("RGB"), "TIFF", icc_profile=profile)
    assert np.array_equal(values_of(decode_image(data))[..., 0], VALUES)


def lightness(value: float) -> float:
    """The sRGB grey of a CIE lightness from 8 to 100."""
    return float(srgb_encoded(((value + 16) / 116) ** 3))


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_inks_follow_their_profile_and_without_one_a_plain_formula(file_format: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 128))
    with_profile = decode_image(encoded(image, file_format, icc_profile=cmyk_profile()))
    assert abs(with_profile.getpixel((8, 8))[0] - lightness(100 * 127 / 255)) <= 2
    assert abs(decode_image(encoded(image, file_format)).getpixel((8, 8))[0] - 127) <= 1


def test_lab_pixels_become_the_same_colours_of_srgb() -> None:
    grey = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (128, 128, 128)])
    data = encoded(grey, "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "LAB"
    assert np.abs(values_of(decode_image(data)) - lightness(100 * 128 / 255)).max() <= 1


# 0x109 is 16.502 of 255.
TWELVE_BITS = bytes([0x00, 0x07, 0xFF, 0x10, 0x9F, 0xFF])


@pytest.mark.parametrize(
    ("bits", "strip", "values", "zero_is_white"),
    [
        (1, bytes([0b10100000]), [1, 0, 1, 0, 0, 0, 0, 0], False),
        (1, bytes([0b10100000]), [1, 0, 1, 0, 0, 0, 0, 0], True),
        (8, bytes([0, 55, 128, 255]), [0, 55, 128, 255], False),
        (8, bytes([0, 55, 128, 255]), [0, 55, 128, 255], True),
        (12, TWELVE_BITS, [0, 0x7FF, 0x109, 0xFFF], False),
        (16, np.array([0, 14135, 32896, 65535], "<u2").tobytes(), [0, 14135, 32896, 65535], False),
        (16, np.array([0, 14135, 32896, 65535], "<u2").tobytes(), [0, 14135, 32896, 65535], True),
    ],
)
@pytest.mark.reliability_row(13)
def test_a_grey_tiff_is_read_from_its_own_black_to_its_own_white(
    bits: int, strip: bytes, values: list[int], zero_is_white: bool
) -> None:
    share = np.array(values) / (2**bits - 1)
    expected = 255 * (1 - share if zero_is_white else share)
    decoded = decode_image(tiff(len(values), strip, bits=bits, zero_is_white=zero_is_white))
    assert np.abs(values_of(decoded)[0, :, 0] - expected).max() <= 0.501


def test_a_tiff_whose_zero_is_white_follows_its_profile_after_it_was_turned() -> None:
    grey = Image.fromarray(np.array([[65535 - 14135]], dtype=np.uint16))
    data = encoded(grey, "TIFF", icc_profile=icc_profile("GRAY", gamma=1.0), tiffinfo={262: 0})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0
    assert abs(decode_image(data).getpixel((0, 0))[0] - srgb_encoded(14135 / 65535)) <= 1

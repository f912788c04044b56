"""Image files to pixels, never trusting the file."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.images import decode_image, inspect_image, resize_and_crop
from simpletuner.helpers.errors import DataError


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    """An image whose every part differs, so that a lost part shows."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode=mode if channels > 1 else None).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG", "AVIF"])
def test_inspect_image_reads_the_size_in_every_format(file_format: str) -> None:
    assert inspect_image(encoded(noise(), file_format)) == Size(height=32, width=48)


def test_decode_image_gives_lossless_pixels_back() -> None:
    image = noise()
    assert np.array_equal(np.asarray(decode_image(encoded(image))), np.asarray(image))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.reliability_row(13)
def test_a_truncated_image_is_refused(file_format: str, share: float) -> None:
    data = encoded(noise((64, 64)), file_format)
    with pytest.raises(DataError, match=r"cut off|header is damaged|content is none of"):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (b"\n\n  <HTML>", "web page"),
        (b"<?xml version='1.0'?><svg/>", "web page or XML"),
        (b"\0" * 100, "content is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "content is none of"),
    ],
    ids=["empty", "html", "html in capitals", "svg", "zeros", "postscript"],
)
@pytest.mark.reliability_row(13)
def test_what_is_no_image_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        inspect_image(data)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
@pytest.mark.reliability_row(13)
def test_an_animated_image_is_refused(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="animated or has several pages"):
        inspect_image(data)


@pytest.mark.reliability_row(13)
def test_a_phone_image_with_a_second_view_is_used() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise((24, 16))])
    assert inspect_image(data) == Size(height=32, width=48)


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (1, 100_000, "edge over the allowed"),
        (10_000, 10_000, "over the allowed 67108864 pixels"),
        (30_000, 30_000, "allowed 67108864 pixels"),
        (12_000, 9_000, "over the allowed 67108864 pixels"),
        (2**31 - 1, 2**31 - 1, "allowed 67108864 pixels"),
        (3300, 100, "more elongated"),
        (0, 5, "damaged|none of|no size"),
    ],
)
@pytest.mark.reliability_row(14)
def test_a_bomb_is_refused_from_its_header_without_memory(width: int, height: int, reason: str) -> None:
    data = png_header(width, height)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=reason):
            inspect_image(data)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.reliability_row(14)
def test_a_small_file_that_inflates_to_a_large_image_is_refused() -> None:
    data = encoded(Image.new("1", (30_000, 3_000)))
    assert len(data) < 100_000
    with pytest.raises(DataError, match="over the allowed"):
        inspect_image(data)


# An image of four quarters; where the red one is after each EXIF orientation was applied.
@pytest.mark.parametrize(
    ("orientation", "red_corner"),
    [
        (1, "top left"),
        (2, "top right"),
        (3, "bottom right"),
        (4, "bottom left"),
        (5, "top left"),
        (6, "top right"),
        (7, "bottom right"),
        (8, "bottom left"),
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.reliability_row(13)
def test_the_exif_orientation_is_applied(orientation: int, red_corner: str, file_format: str) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("red", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, file_format, exif=exif)
    decoded = decode_image(data)
    assert decoded.size == ((32, 64) if orientation >= 5 else (64, 32))
    corners = {
        "top left": (2, 2),
        "top right": (decoded.width - 3, 2),
        "bottom left": (2, decoded.height - 3),
        "bottom right": (decoded.width - 3, decoded.height - 3),
    }
    red = [name for name, place in corners.items() if decoded.getpixel(place)[1] < 128]
    assert red == [red_corner]
    assert inspect_image(data) == Size(decoded.height, decoded.width)


@pytest.mark.parametrize("name", ["eXIf", "iTXt"])
def test_an_orientation_behind_the_pixels_of_a_png_is_seen_in_the_scan(name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    chunk = name.encode() + (exif.tobytes()[6:] if name == "eXIf" else xmp)
    whole = encoded(noise())
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = whole[:-12] + late + whole[-12:]
    assert decode_image(data).size == (32, 48)
    assert inspect_image(data) == Size(height=48, width=32)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_inspect_image_decodes_no_pixels(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(), file_format)

    def decode(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert inspect_image(data) == Size(height=32, width=48)


@pytest.mark.reliability_row(13)
def test_damaged_exif_does_not_lose_the_image() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert inspect_image(data) == Size(height=32, width=48)


@pytest.mark.reliability_row(13)
def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decoded.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.array([[0, 1 << 20]], dtype=np.int32)), "32-bit numbers"),
        (Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)), "floating point"),
    ],
    ids=["32 bit", "float"],
)
@pytest.mark.reliability_row(13)
def test_pixels_of_unknown_range_are_refused(image: Image.Image, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_image(encoded(image, "TIFF"))


def with_palette_alpha() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (Image.new("RGBA", (2, 1), (0, 0, 255, 0)), [(255, 255, 255)] * 2),
        (Image.new("RGBA", (2, 1), (0, 0, 255, 255)), [(0, 0, 255)] * 2),
        (Image.new("LA", (2, 1), (0, 0)), [(255, 255, 255)] * 2),
        (with_palette_alpha(), [(255, 255, 255), (0, 0, 255)]),
        (Image.new("1", (2, 1), 1), [(255, 255, 255)] * 2),
        (Image.new("L", (2, 1), 7), [(7, 7, 7)] * 2),
    ],
    ids=["clear", "opaque", "grey clear", "palette", "bitmap", "grey"],
)
@pytest.mark.reliability_row(13)
def test_every_mode_becomes_rgb_with_alpha_over_white(
    image: Image.Image, pixels: list[tuple[int, int, int]]
) -> None:
    decoded = decode_image(encoded(image))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == pixels


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
@pytest.mark.reliability_row(13)
def test_cmyk_is_not_inverted(file_format: str) -> None:
    decoded = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), file_format))
    red, green, blue = decoded.getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 16


@pytest.mark.reliability_row(13)
def test_an_embedded_profile_is_converted_to_srgb() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    plain = decode_image(encoded(image))
    damaged = decode_image(encoded(image, icc_profile=b"no profile at all"))
    unfit = decode_image(encoded(image, icc_profile=lab))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(encoded(image, icc_profile=srgb)).tobytes() == plain.tobytes()
    assert damaged.tobytes() == plain.tobytes()
    assert unfit.size == plain.size


def test_a_profile_other_than_srgb_changes_the_pixels() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
        profile = profile.replace(old, new, 1)  # red and green change places
    profile = profile.replace("sRGB".encode("utf-16-be"), "Swap".encode("utf-16-be"))
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert decode_image(encoded(image, icc_profile=profile)).getpixel((0, 0)) == (100, 200, 50)


@settings(max_examples=300, deadline=None)
@given(st.data())
@pytest.mark.reliability_row(13)
def test_a_damaged_image_is_decoded_or_refused_and_nothing_else(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    content = bytearray(encoded(noise((16, 16)), file_format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        size = inspect_image(bytes(content))
        image = decode_image(bytes(content))
    except DataError:
        return
    assert size.height * size.width <= 64 << 20
    assert (image.height, image.width) == (size.height, size.width)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resize_and_crop_gives_lanczos_pixels_from_minus_one_to_one(mode: str) -> None:
    image = decode_image(encoded(noise((40, 30), mode)))
    pixels = resize_and_crop(image, Size(15, 20), top_left=(3, 4), target_px=Size(8, 16))
    resized = image.resize((20, 15), Image.Resampling.LANCZOS)
    expected = np.asarray(resized, dtype=np.float32)[3:11, 4:20].transpose(2, 0, 1) / 127.5 - 1
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize(("color", "value"), [("black", -1.0), ("white", 1.0)])
def test_resize_and_crop_spans_the_whole_range(color: str, value: float) -> None:
    pixels = resize_and_crop(
        Image.new("RGB", (9, 9), color), Size(8, 8), top_left=(0, 0), target_px=Size(8, 8)
    )
    assert pixels.unique().tolist() == [value]


Decoder = Callable[[bytes], object]


@pytest.mark.parametrize("decode", [inspect_image, decode_image])
def test_decoding_the_same_bytes_twice_gives_the_same(decode: Decoder) -> None:
    data = encoded(noise(), "JPEG")
    assert decode(data) == decode(data)

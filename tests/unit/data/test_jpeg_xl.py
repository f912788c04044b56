"""JPEG XL: sizes from the header, pixels from libjxl where its package is installed."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.images import decode_image, inspect_image
from simpletuner.helpers.data.jpeg_xl import is_jpeg_xl, read_header
from simpletuner.helpers.errors import DataError
from tests.unit.data.icc_profiles import icc_profile

# libjxl reads each as 40 x 24 before turning, with the orientation and animation named here.
UPRIGHT, ANIMATED, TURNED, BOTH = (
    bytes.fromhex(f"ff0a{bits}") + bytes(20)
    for bits in ("0588007202", "05882000390100", "0588057202", "05882500390100")
)
# The first 64 bytes of an image of 80 x 64, whose codestream lies in two boxes.
IN_BOXES = bytes.fromhex(
    "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
    "000000116a786c7000000000ff0a8f41240000000c4578696600000000"
    "0000001e6a786c7080000001000000000000000000000000000000000000"
)


@pytest.mark.parametrize(
    ("data", "size", "is_animated"),
    [
        (UPRIGHT, (40, 24), False),
        (ANIMATED, (40, 24), True),
        (TURNED, (24, 40), False),
        (BOTH, (24, 40), True),
        (IN_BOXES, (80, 64), False),
    ],
)
def test_the_header_gives_the_size_upright_and_whether_it_is_animated(
    data: bytes, size: tuple[int, int], is_animated: bool
) -> None:
    assert is_jpeg_xl(data)
    assert read_header(data) == (size, is_animated)


def header_of(*fields: tuple[int, int]) -> bytes:
    """A codestream with these (number, bits) after its two marker bytes, the least significant bit first."""
    value, shift = 0, 0
    for number, count in fields:
        value |= number << shift
        shift += count
    return b"\xff\x0a" + value.to_bytes(20, "little")


# A small square of 16 and of 64 pixels: small, height / 8 - 1, ratio 1:1.
SQUARE_16, SQUARE_64 = (((1, 1), (edge // 8 - 1, 5), (1, 3)) for edge in (16, 64))
# No default metadata, extra fields, orientation 1.
FIELDS = ((0, 1), (1, 1), (0, 3))


@pytest.mark.parametrize(
    ("fields", "is_animated"),
    [
        (((1, 1), *SQUARE_64, (0, 1), (1, 1)), True),
        (((1, 1), *SQUARE_64, (0, 1), (0, 1), (1, 1)), False),
        (((0, 1), (1, 1), (1, 1)), False),
    ],
    ids=["another size to show, animated", "another size to show", "a preview"],
)
def test_the_fields_before_the_animation_are_passed_over(
    fields: tuple[tuple[int, int], ...], is_animated: bool
) -> None:
    assert read_header(header_of(*SQUARE_16, *FIELDS, *fields)) == ((16, 16), is_animated)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_four_orientations_exchange_width_and_height(orientation: int) -> None:
    wide = ((1, 1), (16 // 8 - 1, 5), (0, 3), (64 // 8 - 1, 5))
    data = header_of(*wide, (0, 1), (1, 1), (orientation - 1, 3))
    assert read_header(data)[0] == ((64, 16) if orientation < 5 else (16, 64))


@pytest.mark.parametrize(
    "data",
    [UPRIGHT[:2], UPRIGHT[:3], header_of(*SQUARE_16, *FIELDS, (0, 1), (0, 1))[:4]],
    ids=["everything", "the width", "the last bit"],
)
def test_a_header_that_is_cut_off_is_an_error(data: bytes) -> None:
    with pytest.raises(OSError, match="cut off"):
        read_header(data)


@pytest.mark.parametrize(
    "box", [b"\x00\x00\x00\x04jxlc", b"\x00\x00\x00\x01jxlc" + bytes(8), b"\x00\x00\x00\x08free", b""]
)
def test_a_container_without_a_codestream_is_an_error(box: bytes) -> None:
    with pytest.raises(OSError, match=r"box|codestream"):
        read_header(IN_BOXES[:12] + box)


class TestWithItsPackage:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("pillow_jxl")

    def test_pixels_are_read_as_they_were_written(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
        data = written(Image.fromarray(pixels), lossless=True)
        assert inspect_image(data) == Size(height=33, width=50)
        assert np.array_equal(np.asarray(decode_image(data)), pixels)

    def test_the_profile_that_the_decoder_gives_is_applied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The package's encoder writes none."""
        data = written(Image.new("RGB", (64, 64), (55, 55, 55)), lossless=True)
        decoder = importlib.import_module("pillow_jxl").Decoder
        profile = icc_profile("RGB", gamma=1.0)

        def with_profile(**options: Any) -> Callable[[bytes], tuple[Any, ...]]:
            decode = decoder(**options)
            return lambda content: (*decode(content)[:3], profile, b"")

        monkeypatch.setattr("pillow_jxl.Decoder", with_profile)
        assert np.abs(np.asarray(decode_image(data)).astype(int) - 128).max() <= 1

    @pytest.mark.parametrize("size", [(1, 1), (64, 48), (120, 100), (513, 7), (8, 2000), (1025, 1024)])
    @pytest.mark.parametrize("use_container", [False, True])
    def test_the_header_says_what_the_encoder_was_given(
        self, size: tuple[int, int], *, use_container: bool
    ) -> None:
        image = Image.new("RGB", size)
        assert read_header(written(image, use_container=use_container, effort=1)) == (size, False)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_jpeg_that_became_jpeg_xl_is_turned_once(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.arange(40 * 64 * 3, dtype=np.uint8).reshape(40, 64, 3))
        image.save(tmp_path / "a.jpg", exif=exif)
        with Image.open(tmp_path / "a.jpg") as jpeg:
            data = written(jpeg, lossless_jpeg=True)
        original = decode_image((tmp_path / "a.jpg").read_bytes())
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(original))
        assert inspect_image(data) == Size(height=original.height, width=original.width)

    def test_a_huge_image_is_refused_by_its_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = written(Image.new("RGB", (9000, 8000)), effort=1)
        monkeypatch.setattr("pillow_jxl.Decoder", None)
        with pytest.raises(DataError, match=r"9000x8000.*67108864"):
            inspect_image(data)

    def test_the_packages_own_reader_is_replaced_for_good(self) -> None:
        script = (
            "from PIL import Image\n"
            "from simpletuner.helpers.data.jpeg_xl import JpegXLFile\n"
            "from simpletuner.helpers.data.optional_formats import optional_formats\n"
            "assert 'JXL' in optional_formats()\n"
            "import pillow_jxl\n"
            "assert Image.OPEN['JXL'][0] is JpegXLFile\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_an_animation_and_a_damaged_image_are_refused(self) -> None:
        with pytest.raises(DataError, match="animated"):
            inspect_image(ANIMATED)
        data = written(Image.effect_noise((64, 64), 90).convert("RGB"))
        with pytest.raises(DataError, match="damaged or cut off"):
            decode_image(data[: len(data) // 2])


def written(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JXL", **options)
    return buffer.getvalue()

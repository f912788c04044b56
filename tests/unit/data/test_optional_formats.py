"""Formats of optional packages, under any name."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from simpletuner.helpers.choices import image_files
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.images import decode_image, inspect_image
from simpletuner.helpers.data.optional_formats import optional_formats
from simpletuner.helpers.errors import DataError

HEIC = b"\x00\x00\x00\x18ftypheic" + bytes(40)
JXL = b"\xff\x0a\x05\x88\x00\x72\x02" + bytes(40)
AVIF = b"\x00\x00\x00\x18ftypavif" + bytes(40)


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(image_files, "find_spec", lambda _: None)
    optional_formats.cache_clear()
    yield
    optional_formats.cache_clear()


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("data", "title", "distribution"), [(HEIC, "HEIF", "pillow-heif"), (JXL, "JPEG XL", "pillow-jxl-plugin")]
)
def test_a_format_without_its_package_is_refused_with_the_package_whatever_the_name(
    data: bytes, title: str, distribution: str
) -> None:
    assert optional_formats() == ()
    with pytest.raises(DataError, match=rf"{title}.*{distribution}.*formats"):
        inspect_image(data)


def test_avif_without_a_decoder_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(DataError, match=r"AVIF.*pillow"):
        inspect_image(AVIF)


class TestHeif:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("pillow_heif")

    def test_pixels_are_read_nearly_as_they_were_written(self) -> None:
        pixels = np.linspace(0, 255, 48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
        data = written(Image.fromarray(pixels), quality=-1, chroma=444, matrix_coefficients=0)
        assert inspect_image(data) == Size(height=48, width=64)
        assert np.abs(np.asarray(decode_image(data)).astype(int) - pixels).max() <= 1

    def test_an_orientation_is_applied_once(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.new("RGB", (64, 48))
        image.paste("white", (0, 0, 32, 24))
        data = written(image, exif=exif.tobytes())
        decoded = decode_image(data)
        assert (decoded.width, decoded.height) == (48, 64)
        assert min(decoded.getpixel((47, 0))) > 200
        assert inspect_image(data) == Size(height=64, width=48)

    def test_the_main_image_of_several_is_read_and_damage_is_refused(self) -> None:
        red, blue = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")
        data = written(red, save_all=True, append_images=[blue])
        assert decode_image(data).getpixel((5, 5))[0] > 200
        with pytest.raises(DataError, match="damaged"):
            decode_image(written(red)[:-20])


def written(image: Image.Image, **options: object) -> bytes:
    optional_formats()  # registers the writer too
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", **options)
    return buffer.getvalue()

"""Image formats that optional packages decode: HEIF, of phones, and JPEG XL."""

from __future__ import annotations

from functools import cache

from PIL import Image, features

from simpletuner.helpers.choices.image_files import EXTRA, HEIF, JPEG_XL
from simpletuner.helpers.data.jpeg_xl import JpegXLFile, is_jpeg_xl
from simpletuner.helpers.io.optional import require

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@cache
def optional_formats() -> tuple[str, ...]:
    """Pillow's names of the formats whose packages are installed; Pillow can open them after this call."""
    if HEIF.is_readable:
        require(HEIF.package, extra=EXTRA).register_heif_opener()
    if JPEG_XL.is_readable:
        require(JPEG_XL.package, extra=EXTRA)  # registers its own reader, which is replaced
        Image.register_open(JpegXLFile.format, JpegXLFile, is_jpeg_xl)
    return tuple(each.name for each in (HEIF, JPEG_XL) if each.is_readable)


def missing_decoder(data: bytes) -> str | None:
    """The reason why a file cannot be read that holds a format without a decoder; None for other files."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"avif", b"avis") and not features.check("avif"):
        return "it holds AVIF, which this build of Pillow does not read: pip install --upgrade pillow"
    for each, is_held in ((HEIF, brand in _HEIF_BRANDS), (JPEG_XL, is_jpeg_xl(data))):
        if is_held and not each.is_readable:
            return f"it holds {each.title}: {each.remedy}"
    return None

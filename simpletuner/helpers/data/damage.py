"""Finds damage that Pillow's decoders pass over: they fill in what is missing and give no sign.

JPEG decoders only warn, Pillow reads no checksum of PNG, WebP has none, and zeros are valid AV1. What a
format cannot show is not found: damage in BMP and in raw or LZW TIFF, and changed bytes that leave the
lengths as they were.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, TiffImagePlugin

from simpletuner.helpers.data.boxes import top_level_boxes
from simpletuner.helpers.errors import DataError

_JPEG_COLORSPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# libjpeg's warnings of lost pixels; its others are about metadata or oddities of an encoder.
_JPEG_DAMAGE = re.compile(
    r"premature end|bad Huffman code|bad arithmetic code|instead of RST|"
    r"(?P<extra>\d+) extraneous bytes before marker 0x(?P<marker>\w\w)",
    re.IGNORECASE,
)
# Some cameras leave a few bytes of a scan over; damage leaves more.
_HARMLESS_EXTRA_BYTES = 4
_END_OF_IMAGE = b"\xff\xd9"

_WEBP_COLOUR = (b"VP8 ", b"VP8L")
_WEBP_PIXELS = (*_WEBP_COLOUR, b"ALPH")
# An encoder pads its last byte or word. The files of libwebp lose pixels when six bytes are missing.
_WEBP_TAIL_BYTES = 16

# AV1's symbol probabilities adapt, so N zero bytes have a probability of about 256^-N. The longest run that
# an encoder wrote in our tests has three.
_AV1_ZEROS = bytes(64)

_TIFF_DEFLATE, _TIFF_JPEG = (8, 32946), 7
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_CHUNKS = ((273, 279), (324, 325))  # offsets and lengths of strips, of tiles
# Four samples of 32 bits.
_TIFF_LARGEST_PIXEL_BYTES = 16
_STEP_BYTES = 1 << 20


def load_strictly(image: Image.Image, data: bytes) -> Image.Image:
    """The image with its pixels decoded; `image` was opened from `data` and its size was checked.

    Raises:
        DataError: The pixels are damaged.
        Exception: Whatever Pillow's decoders raise on damaged files.
    """
    if image.format in ("JPEG", "MPO"):
        return _load_jpeg(image, data)
    if image.format == "PNG":
        _check_png_sums(data)
    elif image.format == "WEBP":
        _refuse_spare_webp_tail(data)
    elif image.format == "AVIF":
        _refuse_zeros_in_avif(image, data)
    image.load()
    if image.format == "TIFF":
        _refuse_damaged_tiff(image, data)
    return image


def _load_jpeg(image: Image.Image, data: bytes) -> Image.Image:
    """Decode with libjpeg's warnings read; the pixels are those of Pillow, which has the same library."""
    pixels = _strict_jpeg_pixels(image, data)
    if pixels is None or image.mode == "CMYK":  # Pillow knows which encoders invert CMYK
        image.load()
        return image
    loaded = Image.fromarray(pixels if image.mode == "RGB" else pixels[:, :, 0])
    loaded.info.update(image.info)
    return loaded


def _strict_jpeg_pixels(image: Image.Image, data: bytes) -> npt.NDArray[np.uint8] | None:
    """[H, W, C] as stored; None if libjpeg warned of something harmless."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # about metadata, else Pillow refuses the image
    if (width, height) != image.size:
        raise DataError("it is damaged: its header holds two sizes")
    pixels: npt.NDArray[np.uint8]
    try:
        pixels = simplejpeg.decode_jpeg(data, _JPEG_COLORSPACES[image.mode])
    except ValueError as error:
        _refuse_jpeg_damage(str(error), data)
        return None
    return pixels


def _refuse_jpeg_damage(warning: str, data: bytes) -> None:
    """Raise for a warning of libjpeg that means lost pixels."""
    found = _JPEG_DAMAGE.search(warning)
    if found is None:
        return
    extra = int(found["extra"] or 0)
    is_last = found["marker"] == _END_OF_IMAGE[1:].hex()
    if extra and (extra <= _HARMLESS_EXTRA_BYTES or (is_last and _is_padding(data, extra))):
        return
    raise DataError(f"it is damaged or cut off: {warning.removeprefix('Corrupt JPEG data: ')}")


def _is_padding(data: bytes, length: int) -> bool:
    """Whether one byte, repeated, stands before the end of the image."""
    end = data.find(_END_OF_IMAGE, _scan_start(data))
    return end >= length and len(set(data[end - length : end])) == 1


def _scan_start(data: bytes) -> int:
    """The offset of the first scan, behind segments that may hold previews."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and data[offset + 1 : offset + 2] != b"\xda":
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return offset


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset of its content, length) of each chunk of a PNG."""
    offset = 8
    while offset + 8 <= len(data):
        length = int.from_bytes(data[offset : offset + 4], "big")
        yield data[offset + 4 : offset + 8], offset + 8, length
        offset += 12 + length


def _check_png_sums(data: bytes) -> None:
    """Raise if a chunk of pixels does not have its checksum; a missing one is left to Pillow."""
    for kind, start, length in png_chunks(data):
        stored = data[start + length : start + length + 4]
        if kind == b"IDAT" and len(stored) == 4:
            computed = zlib.crc32(data[start : start + length], zlib.crc32(kind))
            if computed != int.from_bytes(stored, "big"):
                raise DataError("it is damaged: a checksum of its pixels differs")


def _refuse_spare_webp_tail(data: bytes) -> None:
    """Raise if the pixels are decoded without the last bytes of their chunk: the decoder lost its place.

    A decoder that reads garbage needs fewer bytes than there are or more, and says so only if it needs more.
    """
    for start, length in _webp_pixel_chunks(data):
        kept = data[start : start + length - _WEBP_TAIL_BYTES]
        after = data[start + length + length % 2 :]
        body = data[12 : start - 4] + struct.pack("<I", len(kept)) + kept + bytes(len(kept) % 2) + after
        shorter = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
        try:
            Image.open(io.BytesIO(shorter), formats=["WEBP"]).load()
        except (OSError, SyntaxError, ValueError):
            continue
        raise DataError("it is damaged: its pixels end before its data")


def _webp_pixel_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) of the content of the chunks of alpha, if any, and of colour."""
    offset = 12
    while offset + 8 <= len(data):
        kind, length = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        if kind in _WEBP_PIXELS:
            yield offset + 8, length
        if kind in _WEBP_COLOUR:
            return
        offset += 8 + length + length % 2


def _refuse_zeros_in_avif(image: Image.Image, data: bytes) -> None:
    """Raise if there are zeros among the coded pixels; metadata between them may hold any."""
    coded = b"".join(_media_data(data))
    for metadata in filter(None, map(image.info.get, ("exif", "xmp", "icc_profile"))):
        if _AV1_ZEROS in metadata and metadata not in coded:
            return  # Pillow changed the orientation in it
        coded = coded.replace(metadata, b"")
    if _AV1_ZEROS in coded:
        raise DataError("it is damaged: a part of its pixels is overwritten with zeros")


def _media_data(data: bytes) -> Iterator[bytes]:
    """The content of each mdat box, up to a box without a valid size."""
    with suppress(OSError):
        yield from (data[start:end] for kind, start, end in top_level_boxes(data) if kind == b"mdat")


def _refuse_damaged_tiff(image: Image.Image, data: bytes) -> None:
    """Raise if a strip or tile is damaged and its compression shows it; libtiff has decoded the image."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    compression = tags.get(_TIFF_COMPRESSION)
    budget = _TIFF_LARGEST_PIXEL_BYTES * max(image.width * image.height, _STEP_BYTES)
    for offsets, lengths in _TIFF_CHUNKS:
        for offset, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False):
            chunk = data[offset : offset + length]
            if compression == _TIFF_JPEG:
                budget -= _check_jpeg_chunk(tags.get(_TIFF_JPEG_TABLES, b""), chunk)
            elif compression in _TIFF_DEFLATE:
                budget -= _check_deflated(chunk, limit=budget)
            if budget < 0:
                raise DataError("its strips hold more than its pixels")


def _check_jpeg_chunk(tables: bytes, chunk: bytes) -> int:
    """The number of pixels in a JPEG stream, whose tables may stand elsewhere."""
    stream = tables[:-2] + chunk[2:] if tables else chunk
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(stream)
        simplejpeg.decode_jpeg(stream, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        _refuse_jpeg_damage(str(error), stream)
        return 0
    return int(height * width)


def _check_deflated(chunk: bytes, *, limit: int) -> int:
    """The bytes of a zlib stream, counted up to the limit; it must end with its checksum."""
    stream, rest, total = zlib.decompressobj(), chunk, 0
    while not stream.eof and total <= limit:
        inflated = stream.decompress(rest, _STEP_BYTES)
        rest = stream.unconsumed_tail
        if not inflated and not rest:
            raise DataError("it is cut off: a strip ends early")
        total += len(inflated)
    return total

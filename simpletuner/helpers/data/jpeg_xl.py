"""JPEG XL files: the size is read from the header, the pixels are decoded on load.

pillow-jxl-plugin's own reader decodes the whole image when it opens it, before its size can be checked, and
leaves an EXIF orientation beside pixels that are upright already. Source of the header: ISO/IEC 18181-1,
SizeHeader and ImageMetadata.
"""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageFile, ImageOps

from simpletuner.helpers.choices.image_files import EXTRA, JPEG_XL
from simpletuner.helpers.data.boxes import top_level_boxes
from simpletuner.helpers.io.optional import require

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
# More than the header that is read: 2 sizes of at most 69 bits, 7 bits between them.
_HEADER_BYTES = 32
_EDGE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height, by the header's number from 1."""
_FIRST_TURNED = 5
"""EXIF orientations from here on exchange width and height."""


class JpegXLFile(ImageFile.ImageFile):
    """A JPEG XL image, upright: the orientation in its header is applied by the decoder."""

    format = JPEG_XL.name
    _content: bytes
    """Of the file; empty once it is decoded."""
    _is_animated: bool

    def seek(self, frame: int) -> None:
        """Check that a frame exists; only the first one is decoded."""
        if frame and not self._is_animated:
            raise EOFError

    def load(self) -> Any:
        """Decode the pixels.

        Raises:
            OSError: They are damaged.
        """
        if self._content:
            image = _decoded(self._content, size=self.size)
            self._content = b""
            self.im, self._mode, self._size, self.info = image.im, image.mode, image.size, image.info
        return super().load()

    def _open(self) -> None:
        assert self.fp is not None, "an opened file"
        self._content = self.fp.read()
        self._mode = "RGB"  # until load()
        self._size, self._is_animated = read_header(self._content)


def is_jpeg_xl(data: bytes) -> bool:
    """Whether a file begins as JPEG XL does."""
    return data.startswith((_CODESTREAM, _CONTAINER))


def read_header(data: bytes) -> tuple[tuple[int, int], bool]:
    """(width, height) in pixels, upright, and whether the image is animated.

    Raises:
        OSError: The header is cut off or there is none.
    """
    bits = _Bits(_codestream(data))
    width, height = _size(bits)
    has_default_metadata = bits.read(1)
    if has_default_metadata or not bits.read(1):
        return (width, height), False
    if bits.read(3) + 1 >= _FIRST_TURNED:
        width, height = height, width
    if bits.read(1):  # the size at which to show it
        _size(bits)
    # Limit: animation behind a preview is not found. Encoders write no previews.
    has_preview = bits.read(1)
    return (width, height), bool(not has_preview and bits.read(1))


class _Bits:
    """Reads numbers from bytes, the least significant bit first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def read(self, count: int) -> int:
        if count > self._left:
            raise OSError("the header is cut off")
        number = self._value & ((1 << count) - 1)
        self._value, self._left = self._value >> count, self._left - count
        return number


def _size(bits: _Bits) -> tuple[int, int]:
    is_small = bits.read(1)
    height = _edge(bits, is_small)
    ratio = bits.read(3)
    if not ratio:
        return _edge(bits, is_small), height
    across, down = _RATIOS[ratio - 1]
    return height * across // down, height


def _edge(bits: _Bits, is_small: int) -> int:
    return 8 * (bits.read(5) + 1) if is_small else bits.read(_EDGE_BITS[bits.read(2)]) + 1


def _codestream(data: bytes) -> bytes:
    """The beginning of the codestream after its two marker bytes, from all boxes that hold parts of it."""
    if data.startswith(_CONTAINER):
        data = b"".join(_boxes(data))
    if not data.startswith(_CODESTREAM):
        raise OSError("there is no codestream")
    return data[len(_CODESTREAM) : _HEADER_BYTES]


def _boxes(data: bytes) -> list[bytes]:
    parts: list[bytes] = []
    for kind, start, end in top_level_boxes(data):
        if kind in (b"jxlc", b"jxlp"):
            start += 4 if kind == b"jxlp" else 0  # after a number of 32 bits
            parts.append(data[start : min(end, start + _HEADER_BYTES)])
        if sum(map(len, parts)) >= _HEADER_BYTES:
            break
    return parts


def _decoded(data: bytes, *, size: tuple[int, int]) -> Image.Image:
    try:
        is_jpeg, info, pixels, profile, _ = require(JPEG_XL.package, extra=EXTRA).Decoder(num_threads=0)(data)
    except RuntimeError as error:
        raise OSError("libjxl cannot decode it") from error
    if is_jpeg:  # the very JPEG from which it was made, to be turned by its EXIF orientation
        jpeg = Image.open(io.BytesIO(pixels), formats=("JPEG",))
        if sorted(jpeg.size) != sorted(size):
            raise OSError("its JPEG has another size")
        return ImageOps.exif_transpose(jpeg)
    image = Image.frombytes(info.mode, (info.width, info.height), pixels)
    if profile:
        image.info["icc_profile"] = profile
    return image

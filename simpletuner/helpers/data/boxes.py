"""The boxes of a file in the ISO base media format, in which AVIF and JPEG XL are kept.

Source: ISO/IEC 14496-12, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator


def top_level_boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start and end of its content) of each box; a box may end after the file.

    Raises:
        OSError: A box is shorter than its header.
    """
    offset = 0
    while offset + 8 <= len(data):
        size, start = int.from_bytes(data[offset : offset + 4], "big"), offset + 8
        if size == 1:  # the size follows, in 64 bits
            size, start = int.from_bytes(data[offset + 8 : offset + 16], "big"), offset + 16
        end = offset + size if size else len(data)  # 0: up to the end of the file
        if end < start:
            raise OSError("a box is shorter than its header")
        yield data[offset + 4 : offset + 8], start, end
        offset = end

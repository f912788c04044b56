"""Boxes of the ISO base media format, with sizes of 32 and 64 bits."""

from __future__ import annotations

import struct

import pytest

from simpletuner.helpers.data.boxes import top_level_boxes

EMPTY = struct.pack(">I4s", 8, b"free")
SHORT = struct.pack(">I4s", 11, b"ftyp") + b"abc"
LONG = struct.pack(">I4sQ", 1, b"mdat", 18) + b"xy"
LAST = struct.pack(">I4s", 0, b"mdat") + b"to the end"


def test_each_box_gives_its_kind_and_content_and_size_zero_reaches_the_end() -> None:
    data = SHORT + EMPTY + LONG + LAST
    found = [(kind, data[start:end]) for kind, start, end in top_level_boxes(data)]
    assert found == [(b"ftyp", b"abc"), (b"free", b""), (b"mdat", b"xy"), (b"mdat", b"to the end")]


@pytest.mark.parametrize(
    "box", [struct.pack(">I4s", 7, b"mdat"), struct.pack(">I4sQ", 1, b"mdat", 15)], ids=["32 bits", "64 bits"]
)
def test_a_box_shorter_than_its_header_is_refused_after_those_before_it(box: bytes) -> None:
    boxes = top_level_boxes(SHORT + box)
    assert next(boxes)[0] == b"ftyp"
    with pytest.raises(OSError, match="shorter"):
        next(boxes)


def test_what_is_too_short_for_a_header_is_no_box() -> None:
    assert not list(top_level_boxes(b"\x00" * 7))

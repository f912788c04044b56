"""Damaged images are refused, sound ones are not. All of them: `pytest -m slow --log-cli-level INFO`."""

from __future__ import annotations

import io
import logging
import struct
import time
import zlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.damage import load_strictly
from simpletuner.helpers.data.images import decode_image, inspect_image
from simpletuner.helpers.errors import DataError
from tests.unit.data.image_samples import (
    FILM,
    Recipe,
    encoded,
    kinds,
    mutations,
    photograph,
    refused,
    share_of_wrong_rows,
    sound_images,
    tiff,
)

logger = logging.getLogger(__name__)

SHOWN_SHARE = 0.01
# These formats have neither lengths nor checksums among their pixels.
BLIND = ("BMP", "TIFF raw")
# Bytes changed, or shifted by one, that a decoder reads as other pixels of the same number.
UNSEEN = {"4 KiB of noise", "16 bytes of noise", "one bit", "one byte more", "a sector twice"}


def accepted_with_wrong_rows(kind: str, data: bytes) -> dict[str, float]:
    """Mutation -> share of wrong rows, of those that are decoded without an error."""
    sound = decode_image(data)
    shares = {}
    for name, damaged in mutations(data, kind).items():
        try:
            shares[name] = share_of_wrong_rows(sound, decode_image(damaged))
        except DataError:
            continue
    return {name: share for name, share in shares.items() if share > SHOWN_SHARE}


@pytest.mark.parametrize("kind", ["JPEG", "JPEG progressive", "JPEG optimised", "PNG", "WebP", "AVIF", "GIF"])
@pytest.mark.reliability_row(13)
def test_an_image_with_lost_pixels_is_refused(kind: str) -> None:
    assert set(accepted_with_wrong_rows(kind, kinds(photograph(400, 266))[kind]())) <= UNSEEN


@pytest.mark.parametrize("kind", ["WebP lossless", "TIFF deflate", "TIFF JPEG", "JPEG with restarts"])
def test_an_image_of_a_rarer_kind_with_zeros_in_it_is_refused(kind: str) -> None:
    accepted = accepted_with_wrong_rows(kind, kinds(photograph(400, 266))[kind]())
    assert not [name for name in accepted if "zeros" in name]


@pytest.mark.slow
def test_of_all_mutations_of_a_large_photograph_few_are_accepted() -> None:
    num_mutations, accepted = 0, {}
    for kind, make in kinds(photograph(900, 600)).items():
        data = make()
        num_mutations += len(mutations(data, kind))
        accepted[kind] = accepted_with_wrong_rows(kind, data)
        logger.info("%s, %d bytes: accepted with wrong rows: %s", kind, len(data), accepted[kind])
    seen = [name for kind, names in accepted.items() if kind not in BLIND for name in names]
    logger.info("%d of %d accepted beside %s", len(seen), num_mutations, BLIND)
    assert len(seen) <= 12  # 69 without the checks
    assert set(seen) <= UNSEEN


def check_sound(images: Iterator[Recipe]) -> int:
    """The number of images, each of which is decoded and has the size of its header."""
    names = set()
    for name, make in images:
        data = make()
        assert refused(decode_image, data, DataError) is None, name
        image = decode_image(data)
        assert inspect_image(data) == Size(height=image.height, width=image.width), name
        names.add(name)
    return len(names)


@pytest.mark.reliability_row(13)
def test_a_sound_image_is_not_refused() -> None:
    assert check_sound(islice(sound_images(), 0, None, 6)) > 40


@pytest.mark.slow
def test_no_sound_image_is_refused() -> None:
    assert check_sound(sound_images()) >= 200


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}], ids=str)
def test_a_strictly_decoded_jpeg_has_pillows_pixels(mode: str, options: dict[str, object]) -> None:
    data = encoded(photograph(123, 77).convert(mode), "JPEG", **options)
    assert np.array_equal(
        np.asarray(decode_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize(
    ("extra", "is_damage"),
    [
        # libjpeg reads three more bytes of the scan and counts those after them.
        (b"\x37\x11\x52\x99\x41\x23\x61", False),
        (b"\x37\x11\x52\x99\x41\x23\x61\x35", True),
        (b"\x37\x11\x52\x99" * 4, True),
        (bytes(64), False),
        (b"\xff" * 64, False),
    ],
    ids=["4 bytes", "5 bytes", "a part of a scan", "zeros", "fill bytes"],
)
def test_bytes_between_the_pixels_and_the_end_of_a_jpeg_are_damage_if_they_are_many(
    extra: bytes, is_damage: bool
) -> None:
    data = encoded(photograph(64, 48), "JPEG", optimize=True)
    reason = refused(decode_image, data[:-2] + extra + data[-2:], DataError)
    assert (reason is not None) == is_damage
    assert reason is None or "extraneous bytes" in reason


def test_bytes_before_a_restart_of_a_jpeg_are_damage_even_if_its_end_is_padded() -> None:
    data = encoded(photograph(64, 48), "JPEG", restart_marker_rows=1)
    restart = data.index(b"\xff\xd1")
    damaged = data[:restart] + bytes(64) + data[restart:-2] + bytes(64) + data[-2:]
    assert "64 extraneous bytes" in str(refused(decode_image, damaged, DataError))


def test_an_end_marker_in_a_preview_is_not_taken_for_the_images_own() -> None:
    preview = encoded(photograph(24, 16), "JPEG")
    data = encoded(
        photograph(64, 48), "JPEG", optimize=True, exif=b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6) + preview
    )
    assert refused(decode_image, data[:-2] + bytes(64) + data[-2:], DataError) is None


@pytest.mark.reliability_row(14)
def test_a_jpeg_with_two_sizes_is_refused_before_memory_is_taken() -> None:
    data = encoded(photograph(64, 48), "JPEG")
    frame = data.index(b"\xff\xc0")
    larger = data[frame : frame + 5] + struct.pack(">HH", 65000, 65000) + data[frame + 9 : frame + 19]
    for hostile in (data[:frame] + larger + data[frame:], data[: frame + 19] + larger + data[frame + 19 :]):
        assert refused(decode_image, hostile, DataError) is not None


def test_zeros_in_the_alpha_of_a_webp_are_found() -> None:
    clear = photograph(400, 266).convert("RGBA")
    clear.putalpha(photograph(400, 266).convert("L"))
    data = encoded(clear, "WEBP", quality=80)
    start = data.index(b"ALPH") + 8
    length = int.from_bytes(data[start - 4 : start], "little")
    damaged = data[: start + length // 2] + bytes(length - length // 2) + data[start + length :]
    assert refused(decode_image, data, DataError) is None
    assert refused(decode_image, damaged, DataError) is not None


def test_zeros_in_a_webp_are_found_behind_a_chunk_of_odd_length() -> None:
    data = encoded(photograph(240, 160), "WEBP", quality=80, icc_profile=b"odd")
    start = data.index(b"VP8 ") + 8
    assert data[start - 12 : start - 8] == b"odd\0"
    damaged = data[: -len(data[start:]) // 2].ljust(len(data), b"\0")
    assert refused(decode_image, data, DataError) is None
    assert "end before its data" in str(refused(decode_image, damaged, DataError))


def test_zeros_in_the_exif_data_of_an_avif_are_no_damage_and_zeros_in_its_pixels_are() -> None:
    exif = Image.Exif()
    exif[0x010E] = "zeros follow" + "\0" * 500
    data = encoded(photograph(240, 160), "AVIF", speed=9, exif=exif)
    assert data.count(bytes(400)) == 1
    assert refused(decode_image, data, DataError) is None
    assert "zeros" in str(refused(decode_image, data[:-300] + bytes(300), DataError))


def test_boxes_beside_the_pixels_of_an_avif_may_hold_zeros() -> None:
    data = encoded(photograph(240, 160), "AVIF", speed=9)
    assert refused(decode_image, data + struct.pack(">I4s", 508, b"free") + bytes(500), DataError) is None
    assert refused(decode_image, data + FILM, DataError) is None


@pytest.mark.reliability_row(14)
def test_a_jpeg_is_not_decoded_to_another_size_than_the_one_that_was_checked() -> None:
    checked = Image.open(io.BytesIO(encoded(photograph(64, 48), "JPEG")))
    with pytest.raises(DataError, match="two sizes"):
        load_strictly(checked, encoded(photograph(123, 77), "JPEG"))


@pytest.mark.reliability_row(14)
def test_a_strip_that_inflates_without_end_is_refused_after_a_bounded_part_of_it() -> None:
    stream = zlib.compressobj()
    start = stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    mebibyte = stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    bomb = tiff(30, start + 20_000 * mebibyte, bits=8, compression=8)
    began_s = time.process_time()
    assert "strips hold more" in str(refused(decode_image, bomb, DataError))
    assert time.process_time() - began_s < 2


@pytest.mark.reliability_row(14)
def test_strips_of_jpeg_without_end_are_refused_after_a_bounded_part_of_them() -> None:
    strip = encoded(photograph(64, 48).convert("L"), "JPEG")
    num_strips = (1 << 24) // (64 * 48) + 1  # more than 16 for each pixel of the smallest budget
    data = tiff(64, strip, height=48, bits=8, compression=7, num_strips=num_strips)
    assert "strips hold more" in str(refused(decode_image, data, DataError))
    assert refused(decode_image, tiff(64, strip, height=48, bits=8, compression=7), DataError) is None

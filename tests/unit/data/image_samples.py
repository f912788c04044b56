"""Sound images of every kind, and damaged ones: what the damage check must accept and refuse."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product

import numpy as np
from PIL import Image, ImageCms, ImageDraw

Recipe = tuple[str, Callable[[], bytes]]
"""A name, and what makes the file."""

# As written into a motion photograph: a box of an MP4 film.
FILM = struct.pack(">I4s", 24, b"ftyp") + b"mp42\0\0\0\0mp42isom" + bytes(range(256)) * 40


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@cache
def photograph(width: int, height: int) -> Image.Image:
    """Smooth areas, edges, shadows and the noise of a sensor."""
    rng = np.random.default_rng(7)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = []
    for channel in range(3):
        plane = 90 + 60 * y + 40 * np.sin(9 * x + channel)
        for _ in range(25):
            cx, cy, radius, level = *rng.random(2), 0.03 + 0.15 * rng.random(), rng.normal(0, 40)
            plane += np.where((x - cx) ** 2 + (y - cy) ** 2 < radius**2, level, 0)
        plane += 12 * np.sin(x * 200 + 90 * y * y) + rng.normal(0, 5, plane.shape)
        planes.append(plane)
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def kinds(image: Image.Image) -> dict[str, Callable[[], bytes]]:
    """One picture in files of every kind."""
    return {
        "JPEG": partial(encoded, image, "JPEG", quality=88),
        "JPEG optimised": partial(encoded, image, "JPEG", quality=92, subsampling=0, optimize=True),
        "JPEG progressive": partial(encoded, image, "JPEG", quality=88, progressive=True),
        "JPEG with restarts": partial(encoded, image, "JPEG", quality=88, restart_marker_rows=1),
        "PNG": partial(encoded, image, "PNG"),
        "WebP": partial(encoded, image, "WEBP", quality=85),
        "WebP lossless": partial(encoded, image, "WEBP", lossless=True),
        "AVIF": partial(encoded, image, "AVIF", quality=80, speed=8),
        "TIFF deflate": partial(encoded, image, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": partial(encoded, image, "TIFF", compression="jpeg"),
        "TIFF LZW": partial(encoded, image, "TIFF", compression="tiff_lzw"),
        "TIFF raw": partial(encoded, image, "TIFF"),
        "BMP": partial(encoded, image, "BMP"),
        "GIF": partial(encoded, image, "GIF"),
    }


END_MARKERS = {"JPEG": b"\xff\xd9", "PNG ": bytes.fromhex("0000000049454e44ae426082"), "GIF ": b"\0;"}


def mutations(data: bytes, kind: str) -> dict[str, bytes]:
    """The file cut off, with a part overwritten, missing, doubled or shifted."""
    size, middle, rng = len(data), len(data) // 2, random.Random(1)
    damaged = {f"cut off at {share} %": data[: size * share // 100] for share in (10, 50, 90, 99)}
    for name, marker in END_MARKERS.items():
        if f"{kind} ".startswith(name):
            damaged["end marker in the middle"] = data[:middle] + marker + data[middle:]
            damaged["cut off, with an end marker"] = data[:middle] + marker
    for share in (30, 50, 80):
        start = size * share // 100
        damaged[f"4 KiB of zeros at {share} %"] = data[:start] + bytes(4096) + data[start + 4096 :]
    for share in (50, 70, 90, 95):
        damaged[f"zeros from {share} % on"] = data[: size * share // 100].ljust(size, b"\0")
    damaged["4 KiB missing"] = data[:middle] + data[middle + 4096 :]
    damaged["4 KiB of noise"] = data[:middle] + rng.randbytes(4096) + data[middle + 4096 :]
    damaged["16 bytes of noise"] = data[:middle] + rng.randbytes(16) + data[middle + 16 :]
    damaged["one bit"] = data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]
    damaged["a sector twice"] = data[:middle] + 2 * data[middle : middle + 512] + data[middle + 1024 :]
    damaged["one byte more"] = data[:middle] + b"\x55" + data[middle:]
    return damaged


def share_of_wrong_rows(expected: Image.Image, found: Image.Image) -> float:
    """The share of rows in which a value is more than 8 of 255 off."""
    if expected.size != found.size:
        return 1.0
    difference = np.abs(np.asarray(expected).astype(int) - np.asarray(found))
    return float((difference.max(axis=(1, 2)) > 8).mean())


def tiff(
    width: int,
    strip: bytes,
    *,
    height: int = 1,
    bits: int,
    zero_is_white: bool = False,
    compression: int = 1,
    num_strips: int = 1,
) -> bytes:
    """A little-endian grey TIFF of one strip, which its directory may list several times."""
    lists = b"".join(struct.pack("<I", value) * num_strips for value in (8, len(strip)))
    start = 8 + len(strip)
    offsets, lengths = (8, len(strip)) if num_strips == 1 else (start, start + 4 * num_strips)
    fields = {256: width, 257: height, 258: bits, 259: compression, 262: 0 if zero_is_white else 1}
    fields |= {273: offsets, 277: 1, 278: height, 279: lengths}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, num_strips if tag in (273, 279) else 1, value)
        for tag, value in fields.items()
    )
    directory = struct.pack("<H", len(fields)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, start + len(lists)) + strip + lists + directory


def screenshot(width: int = 320, height: int = 200) -> Image.Image:
    """Windows and text on one colour."""
    image = Image.new("RGB", (width, height), (236, 236, 236))
    draw = ImageDraw.Draw(image)
    for row in range(0, height, 40):
        draw.rectangle((10, row + 4, width - 10, row + 34), fill="white", outline=(120, 120, 120))
        draw.text((20, row + 12), f"File  Edit  View  {row}", fill="black")
    return image


def pictures() -> dict[str, Image.Image]:
    """What people train on, and what entropy coders shrink to next to nothing."""
    photo = photograph(240, 160)
    half = photo.copy()
    half.paste("white", (0, 80, 240, 160))
    return {
        "photo": photo,
        "white lower half": half,
        "screenshot": screenshot(),
        "flat": Image.new("RGB", (300, 200), (10, 200, 30)),
        "white": Image.new("RGB", (256, 256), "white"),
        "black": Image.new("RGB", (640, 400)),
        "tiny": photo.resize((5, 3)),
        "one pixel": Image.new("RGB", (1, 1), "red"),
        "odd size": photo.crop((0, 0, 67, 45)),
        "gradient": Image.linear_gradient("L").convert("RGB"),
        "checkerboard": Image.fromarray((np.indices((99, 99)).sum(0) % 2 * 255).astype(np.uint8)).convert(
            "RGB"
        ),
    }


def sound_images() -> Iterator[Recipe]:
    """(name, file) of more than 200 images that any viewer shows whole."""
    photo = photograph(240, 160)
    for make in (_sound_jpegs, _odd_jpegs, _sound_pngs, _sound_webps, _sound_avifs, _sound_others):
        yield from make(photo)


def _sound_jpegs(photo: Image.Image) -> Iterator[Recipe]:
    ways: tuple[dict[str, object], ...] = (
        {},
        {"optimize": True},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"restart_marker_blocks": 3, "optimize": True},
    )
    for way, quality, subsampling in product(ways, (5, 75, 100), (0, 1, 2)):
        options = {**way, "quality": quality, "subsampling": subsampling}
        yield f"JPEG {options}", partial(encoded, photo, "JPEG", **options)
    for (name, picture), way in product(pictures().items(), ways[:3]):
        yield f"JPEG {name} {way}", partial(encoded, picture, "JPEG", **way)
    for mode, way in product(("L", "CMYK"), ways):
        yield f"JPEG {mode} {way}", partial(encoded, photo.convert(mode), "JPEG", **way)
    yield "JPEG of RGB", partial(encoded, photo, "JPEG", keep_rgb=True)


def _odd_jpegs(photo: Image.Image) -> Iterator[Recipe]:
    plain, small = encoded(photo, "JPEG"), encoded(photo.resize((60, 40)), "JPEG")
    for name, tail in {
        "zeros": bytes(500),
        "text": b"made by a camera",
        "film": FILM,
        "gain map": small,
        "end markers": b"\xff\xd9" * 9,
    }.items():
        yield f"JPEG followed by {name}", partial(bytes, plain + tail)
        yield (
            f"progressive followed by {name}",
            partial(bytes, encoded(photo, "JPEG", progressive=True) + tail),
        )
    views = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((60, 40))])
    yield "MPO", partial(bytes, views)
    yield "MPO followed by a film", partial(bytes, views + FILM)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"JPEG of orientation {orientation}", partial(encoded, photo, "JPEG", exif=exif)
    thumbnail = b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6) + small
    yield "JPEG with a preview", partial(encoded, photo, "JPEG", exif=thumbnail)
    yield "JPEG with a comment", partial(encoded, photo, "JPEG", comment=b"\xff\xd9 not the end")
    for count, fill in product((1, 2, 4, 40), (b"\0", b"\xff")):
        yield (
            f"JPEG padded with {count} bytes of {fill.hex()}",
            partial(bytes, plain[:-2] + fill * count + plain[-2:]),
        )
    yield "JPEG of another JFIF version", partial(bytes, plain[:11] + b"\x02" + plain[12:])
    tables = plain.index(b"\xff\xdb")
    yield (
        "JPEG with stray bytes in its header",
        partial(bytes, plain[:tables] + b"stray bytes" + plain[tables:]),
    )


def _sound_pngs(photo: Image.Image) -> Iterator[Recipe]:
    for (name, picture), level in product(pictures().items(), (0, 9)):
        yield f"PNG {name} {level}", partial(encoded, picture, "PNG", compress_level=level)
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"PNG {mode}", partial(encoded, photo.convert(mode), "PNG")
    deep = np.linspace(0, 65535, 200 * 50).reshape(50, 200).astype(np.uint16)
    yield "PNG of 16 bits", partial(encoded, Image.fromarray(deep), "PNG")
    yield "PNG with a clear colour", partial(encoded, photo.convert("P"), "PNG", transparency=3)
    plain, text = encoded(photo, "PNG"), b"tEXtparameters\0a cat, steps: 20"
    late = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    yield "PNG with late text", partial(bytes, plain[:-12] + late + plain[-12:])
    yield "PNG followed by zeros", partial(bytes, encoded(photo, "PNG") + bytes(300))


def _sound_webps(photo: Image.Image) -> Iterator[Recipe]:
    ways = [{"quality": quality, "method": method} for quality, method in product((0, 80, 100), (0, 4, 6))]
    ways += [{"lossless": True, **way} for way in ways]
    for way in ways:
        yield f"WebP {way}", partial(encoded, photo, "WEBP", **way)
    for (name, picture), way in product(pictures().items(), (ways[0], ways[4], ways[9], ways[13])):
        yield f"WebP {name} {way}", partial(encoded, picture, "WEBP", **way)
    for (name, clear), lossless in product(_with_alpha(photo).items(), (True, False)):
        yield f"WebP {name} {lossless}", partial(encoded, clear, "WEBP", lossless=lossless)
    exif = Image.Exif()
    exif[0x010E] = "zeros follow" + "\0" * 500
    yield "WebP with EXIF data", partial(encoded, photo, "WEBP", exif=exif, xmp=b"<x:xmpmeta/>" + b" " * 500)
    yield "WebP followed by zeros", partial(bytes, encoded(photo, "WEBP") + bytes(300))


def _with_alpha(photo: Image.Image) -> dict[str, Image.Image]:
    """Alpha of a photograph, of a shape, and none that shows."""
    made = {name: photo.convert("RGBA") for name in ("soft alpha", "cut-out", "opaque alpha")}
    made["soft alpha"].putalpha(photo.convert("L"))
    made["cut-out"].putalpha(photo.convert("L").point(lambda value: 255 * (value > 128)))
    return made


def _sound_avifs(photo: Image.Image) -> Iterator[Recipe]:
    for quality, subsampling in product((5, 75, 100), ("4:2:0", "4:4:4", "4:0:0")):
        options = {"quality": quality, "subsampling": subsampling}
        yield f"AVIF {options}", partial(encoded, photo, "AVIF", speed=9, **options)
    for (name, picture), quality in product(pictures().items(), (20, 100)):
        yield f"AVIF {name} {quality}", partial(encoded, picture, "AVIF", speed=9, quality=quality)
    for name, clear in _with_alpha(photo).items():
        yield f"AVIF {name}", partial(encoded, clear, "AVIF", speed=9)
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = orientation, "zeros follow" + "\0" * 500
        yield (
            f"AVIF of orientation {orientation}",
            partial(encoded, photo, "AVIF", speed=9, exif=exif, xmp=b"x" + bytes(99)),
        )


def _sound_others(photo: Image.Image) -> Iterator[Recipe]:
    for mode, compression in product(
        ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"), ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
    ):
        values = np.asarray(photo.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(values) if mode == "I;16" else photo.convert(mode)
        yield f"TIFF {mode} {compression}", partial(encoded, image, "TIFF", compression=compression)
    for mode in ("L", "RGB"):
        yield f"TIFF {mode} of JPEG", partial(encoded, photo.convert(mode), "TIFF", compression="jpeg")
    yield "TIFF LAB", partial(encoded, _in_lab(photo), "TIFF")
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"BMP {mode}", partial(encoded, photo.convert(mode), "BMP")
    for name, picture in pictures().items():
        yield f"GIF {name}", partial(encoded, picture, "GIF")
    yield "GIF with a clear colour", partial(encoded, photo.convert("P"), "GIF", transparency=3)
    yield "GIF followed by zeros", partial(bytes, encoded(photo, "GIF") + bytes(300))


def _in_lab(image: Image.Image) -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")


def refused(decode: Callable[[bytes], object], data: bytes, error: type[Exception]) -> str | None:
    """The reason why an image is refused; None if it is not."""
    try:
        decode(data)
    except error as reason:
        return str(reason)
    return None

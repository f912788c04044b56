"""Colour profiles made by the book, and what they mean.

Source: ICC.1:2022, sections 7 (layout), 9 (tags), 10 (types); IEC 61966-2-1 (sRGB).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3_PRIMARIES = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_PRIMARIES = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D50, D65 = (0.9642, 1.0, 0.8249), (0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_encoded(light: Floats | float) -> Floats:
    """Linear light in [0, 1] to sRGB in [0, 255]."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_light(value: Floats | float) -> Floats:
    """sRGB in [0, 1] to linear light in [0, 1]."""
    value = np.asarray(value)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> Floats:
    """The [3, 3] matrix from linear RGB with a white of D65 to XYZ."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, np.array(D65))


def icc_profile(
    space: str,
    *,
    gamma: float | Callable[[Floats], Floats] = 1.0,
    primaries: tuple[tuple[float, float], ...] = SRGB_PRIMARIES,
    name: str = "made for a test",
    version: int = 2,
) -> bytes:
    """A display profile of GRAY or RGB with one curve; gamma 1 is linear light."""
    curve = _curve(gamma)
    tags = {"wtpt": _xyz(D50), "desc": _text(name, version), "cprt": _text("none", version)}
    if space == "GRAY":
        return _profile(space, "XYZ", tags | {"kTRC": curve}, version)
    adapted = np.diag((_BRADFORD @ D50) / (_BRADFORD @ np.array(D65)))
    matrix = np.linalg.inv(_BRADFORD) @ adapted @ _BRADFORD @ to_xyz(primaries)
    for letter, column in zip("rgb", matrix.T, strict=True):
        tags |= {f"{letter}XYZ": _xyz(column), f"{letter}TRC": curve}
    return _profile(space, "XYZ", tags, version)


def cmyk_profile() -> bytes:
    """An output profile whose lightness is 100 (1 - K) on paper without other inks, and 0 with them."""
    corners = [
        (round(255 * (1 - key) * (1 - max(inks))), 128, 128) for *inks, key in product((0, 1), repeat=4)
    ]
    identity = struct.pack(">9i", *(np.eye(3) * 65536).astype(int).ravel())
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4
    table += bytes(value for corner in corners for value in corner) + ramp * 3
    tags = {"desc": _text("inks", 2), "cprt": _text("none", 2), "wtpt": _xyz(D50), "A2B0": table}
    return _profile("CMYK", "Lab", tags, 2, kind="prtr")


def _profile(space: str, connection: str, tags: dict[str, bytes], version: int, kind: str = "mntr") -> bytes:
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI", start + len(body), b"\0\0\0\0", version << 24)
    head += f"{kind:4}{space:4}{connection:4}".encode() + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", *(round(value * 65536) for value in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values: Floats | tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _curve(gamma: float | Callable[[Floats], Floats]) -> bytes:
    if callable(gamma):
        samples = np.round(gamma(np.linspace(0, 1, 4096)) * 65535).astype(">u2")
        return b"curv\0\0\0\0" + struct.pack(">I", len(samples)) + samples.tobytes()
    return b"para\0\0\0\0" + struct.pack(">HHi", 0, 0, round(gamma * 65536))


def _text(text: str, version: int) -> bytes:
    if version >= 4:
        encoded = text.encode("utf-16-be")
        return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded
    encoded = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(encoded)) + encoded + bytes(78)

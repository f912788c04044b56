"""Likeness of an image to a character, by fitting the character's drawing in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from simpletuner.demo.characters import RADIUS_PX, Character, character_mask, draw_character
from simpletuner.demo.parser import MAX_DISTANCE, MIN_OBJECT_PX, foreground, nearest_place, parse_background
from simpletuner.demo.scenes import PLACES, SIZE_PX, Background, ImageArray, Mask, Point, draw_background

Values = NDArray[np.float32]

_SIZES = (0.9, 0.95, 1.0, 1.05)
_PHASES = (0.0, 0.5)
"""Subpixel offsets of the drawings."""
_SHIFTS_PX = range(-2, 3)
_SMOOTH_PX = 5
_EDGE_PX = 40
"""Edge of the square of a drawing at the largest size."""


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A character without background, at one size and subpixel offset, in a [_EDGE_PX, _EDGE_PX] square."""

    covers: Mask
    premultiplied: Values
    """[..., 3] colour times coverage."""
    middle: Point
    """Centre of its bounding box, within the square."""


def likeness(image: ImageArray, character: Character) -> float:
    """Likeness in [0, 1] of an image to a character: the best fit over positions and sizes.

    It is the explained area inside the character's outline, divided by the area of outline and foreground
    together: missing parts, wrong colours and extra objects all lower it. Image and drawing are smoothed,
    because the model's autoencoder blurs smaller details.
    """
    present = foreground(image)
    middle = _middle_of(present)
    if middle is None:
        return 0.0
    margin = ((_EDGE_PX, _EDGE_PX), (_EDGE_PX, _EDGE_PX))
    behind = draw_background(parse_background(image)).astype(np.float32)
    shown = np.pad(_smooth(image - behind), (*margin, (0, 0)))
    behind = np.pad(behind, (*margin, (0, 0)), mode="edge")
    padded, area = np.pad(present, margin), float(present.sum())
    best = 0.0
    for drawing in _drawings(character):
        left = round(middle[0] - drawing.middle[0]) + _EDGE_PX
        top = round(middle[1] - drawing.middle[1]) + _EDGE_PX
        for dx, dy in product(_SHIFTS_PX, _SHIFTS_PX):
            window = np.s_[top + dy : top + dy + _EDGE_PX, left + dx : left + dx + _EDGE_PX]
            drawn = _smooth(drawing.premultiplied - behind[window] * drawing.covers[..., None])
            difference = np.sqrt(((shown[window] - drawn) ** 2).sum(axis=-1))
            explained = float((drawing.covers * (1 - np.minimum(difference / MAX_DISTANCE, 1))).sum())
            missing = float(np.maximum(drawing.covers - padded[window], 0).sum())
            best = max(best, explained / (area + missing))
    return min(best, 1.0)


def _smooth(values: Values) -> Values:
    smoothed: Values = uniform_filter(values, size=(_SMOOTH_PX, _SMOOTH_PX, 1), mode="nearest")
    return smoothed


def parse_place(image: ImageArray) -> str | None:
    """The place nearest to the centre of the foreground; None without a foreground."""
    middle = _middle_of(foreground(image))
    return None if middle is None else nearest_place(middle)


def _middle_of(mask: Mask) -> Point | None:
    """Centre in pixels of a mask's bounding box, without the outermost hundredth at each side."""
    if mask.sum() < MIN_OBJECT_PX:
        return None
    y, x = np.nonzero(mask > 0.5)
    (left, right), (top, bottom) = np.percentile(x, (1, 99)), np.percentile(y, (1, 99))
    return float(left + right + 1) / 2, float(top + bottom + 1) / 2


@cache
def _drawings(character: Character) -> tuple[_Drawing, ...]:
    return tuple(
        _draw(character, size=size, phase=(x, y)) for size in _SIZES for x in _PHASES for y in _PHASES
    )


def _draw(character: Character, *, size: float, phase: Point) -> _Drawing:
    """Draw on black and subtract the background: the rest is colour times coverage."""
    place = "in the center"
    black = draw_character(
        character, place=place, background=_ANY, offset_px=phase, radius_px=RADIUS_PX * size
    ).astype(np.float32)
    covers = character_mask(character, place=place, offset_px=phase, radius_px=RADIUS_PX * size)
    behind = draw_background(_ANY).astype(np.float32)
    premultiplied = black - behind * (1 - covers[..., None])
    start = (SIZE_PX - _EDGE_PX) // 2
    window = np.s_[start : start + _EDGE_PX, start : start + _EDGE_PX]
    middle = _middle_of(covers[window])
    assert middle is not None, f"{character} covers nothing at {PLACES[place]}"
    return _Drawing(covers[window], premultiplied[window], middle)


_ANY = Background("black", "plain")

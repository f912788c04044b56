"""How much of a character a picture shows, by fitting its drawing: closed form, nothing learnt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from simpletuner.demo.characters import RADIUS_PX, Toy, draw_toy, toy_mask
from simpletuner.demo.parser import FAR, MIN_OBJECT_PX, foreground, nearest_place, read_background
from simpletuner.demo.scenes import PLACES, SIZE_PX, Background, Mask, Picture, Point, draw_background

Values = NDArray[np.float32]

_SIZES = (0.9, 0.95, 1.0, 1.05)
_PHASES = (0.0, 0.5)
"""Fractions of a pixel at which drawings are tried."""
_SHIFTS_PX = range(-2, 3)
_SMOOTH_PX = 5
_EDGE_PX = 40
"""Of the square that holds a drawing at the largest size."""


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A character alone, at one size and fraction of a pixel, in a square of [_EDGE_PX, _EDGE_PX]."""

    covers: Mask
    premultiplied: Values
    """[..., 3] colour times cover."""
    middle: Point
    """Of the box around it, within the square."""


def likeness(picture: Picture, toy: Toy) -> float:
    """How much of a character a picture shows, in [0, 1]: the best over positions and sizes.

    What is explained inside the character's outline, over the area of the outline and of everything that is
    not background: missing parts, wrong colours and things that do not belong to it all count against it.
    Picture and drawing are smoothed alike, because the model's autoencoder blurs what is smaller.
    """
    present = foreground(picture)
    middle = _middle_of(present)
    if middle is None:
        return 0.0
    margin = ((_EDGE_PX, _EDGE_PX), (_EDGE_PX, _EDGE_PX))
    behind = draw_background(read_background(picture)).astype(np.float32)
    shown = np.pad(_smooth(picture - behind), (*margin, (0, 0)))
    behind = np.pad(behind, (*margin, (0, 0)), mode="edge")
    padded, area = np.pad(present, margin), float(present.sum())
    best = 0.0
    for drawing in _drawings(toy):
        left = round(middle[0] - drawing.middle[0]) + _EDGE_PX
        top = round(middle[1] - drawing.middle[1]) + _EDGE_PX
        for dx, dy in product(_SHIFTS_PX, _SHIFTS_PX):
            window = np.s_[top + dy : top + dy + _EDGE_PX, left + dx : left + dx + _EDGE_PX]
            drawn = _smooth(drawing.premultiplied - behind[window] * drawing.covers[..., None])
            difference = np.sqrt(((shown[window] - drawn) ** 2).sum(axis=-1))
            explained = float((drawing.covers * (1 - np.minimum(difference / FAR, 1))).sum())
            missing = float(np.maximum(drawing.covers - padded[window], 0).sum())
            best = max(best, explained / (area + missing))
    return min(best, 1.0)


def _smooth(values: Values) -> Values:
    smoothed: Values = uniform_filter(values, size=(_SMOOTH_PX, _SMOOTH_PX, 1), mode="nearest")
    return smoothed


def read_toy_place(picture: Picture) -> str | None:
    """The place nearest to the middle of what is not background; None if there is nothing."""
    middle = _middle_of(foreground(picture))
    return None if middle is None else nearest_place(middle)


def _middle_of(mask: Mask) -> Point | None:
    """The middle of the box around a mask, in pixels; the outermost hundredth at each side does not count."""
    if mask.sum() < MIN_OBJECT_PX:
        return None
    y, x = np.nonzero(mask > 0.5)
    (left, right), (top, bottom) = np.percentile(x, (1, 99)), np.percentile(y, (1, 99))
    return float(left + right + 1) / 2, float(top + bottom + 1) / 2


@cache
def _drawings(toy: Toy) -> tuple[_Drawing, ...]:
    return tuple(_draw(toy, size=size, phase=(x, y)) for size in _SIZES for x in _PHASES for y in _PHASES)


def _draw(toy: Toy, *, size: float, phase: Point) -> _Drawing:
    """Draw on black: what is there is the colour times the cover."""
    place = "in the center"
    black = draw_toy(toy, place=place, background=_ANY, offset_px=phase, radius_px=RADIUS_PX * size).astype(
        np.float32
    )
    covers = toy_mask(toy, place=place, offset_px=phase, radius_px=RADIUS_PX * size)
    behind = draw_background(_ANY).astype(np.float32)
    premultiplied = black - behind * (1 - covers[..., None])
    start = (SIZE_PX - _EDGE_PX) // 2
    window = np.s_[start : start + _EDGE_PX, start : start + _EDGE_PX]
    middle = _middle_of(covers[window])
    assert middle is not None, f"{toy} covers nothing at {PLACES[place]}"
    return _Drawing(covers[window], premultiplied[window], middle)


_ANY = Background("black", "plain")

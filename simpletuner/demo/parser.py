"""Reads pictures of the embedded model's world by fitting templates: closed form, nothing learnt.

A background is the one of all that leaves least unexplained. A shape is the template, of every outline, size,
position and colour, that explains most of what the background does not. A character, whose outline is not
known, is where the background leaves something unexplained.

Shapes: H W pixels, S outlines times sizes, C colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from simpletuner.demo.scenes import (
    COLOURS,
    PLACES,
    RGB,
    SHAPES,
    SIZE_PX,
    Background,
    Mask,
    Picture,
    Point,
    Scene,
    backgrounds,
    draw_background,
    shape_mask,
)

Values = NDArray[np.float32]

ATTRIBUTES = ("background", "pattern", "place", "shape", "colour")
FAR = 100.0
"""Distance in RGB, of at most 441, from which on a pixel counts as not explained at all."""
MIN_OBJECT_PX = 30
"""Pixels that must be explained for there to be an object; the smallest shape has 80."""
_RADII_PX = np.arange(7.0, 14.0, 0.5)
_PADDED_PX = 2 * SIZE_PX


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows."""

    background: Background
    place: str | None
    """The nearest of all places. None if there is no object; so are shape and colour."""
    shape: str | None
    colour: str | None
    unexplained: float
    """Share of the picture, in [0, 1], that background and shape together do not explain."""

    def agrees_with(self, scene: Scene) -> dict[str, bool]:
        """Which attributes are those of a scene."""
        return {
            "background": self.background.colour == scene.background.colour,
            "pattern": self.background.pattern == scene.background.pattern,
            "place": self.place == scene.place,
            "shape": self.shape == scene.shape,
            "colour": self.colour == scene.colour,
        }


def share_right(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, float]:
    """Attribute -> share in [0, 1] of the pictures that show it as the scene has it."""
    agreements = [reading.agrees_with(scene) for reading, scene in zip(readings, scenes, strict=True)]
    return {name: sum(each[name] for each in agreements) / len(agreements) for name in ATTRIBUTES}


def read_scene(picture: Picture) -> Reading:
    """Read a picture of one shape on a background."""
    background = read_background(picture)
    left = misfit(picture, draw_background(background))  # [H, W]
    colours = [colour for colour in COLOURS if colour != background.colour]
    gains = left - np.stack([misfit(picture, _flat(COLOURS[colour])) for colour in colours])  # [C, H, W]
    explained = _correlate(gains)  # [C, S, H, W]
    colour, template, y, x = np.unravel_index(explained.argmax(), explained.shape)
    gain = explained[colour, template, y, x]
    unexplained = float(left.mean() - max(gain, 0) / SIZE_PX**2)
    if gain < MIN_OBJECT_PX:
        return Reading(background, place=None, shape=None, colour=None, unexplained=float(left.mean()))
    return Reading(
        background,
        place=nearest_place((float(x), float(y))),
        shape=tuple(SHAPES)[template // len(_RADII_PX)],
        colour=colours[colour],
        unexplained=unexplained,
    )


def read_background(picture: Picture) -> Background:
    """The background that leaves least of a picture unexplained, whatever lies on it."""
    return min(backgrounds(), key=lambda each: float(misfit(picture, draw_background(each)).mean()))


def read_place(picture: Picture) -> str | None:
    """The place nearest to the middle of what is not background; None if there is nothing."""
    mask = foreground(picture)
    if mask.sum() < MIN_OBJECT_PX:
        return None
    y, x = np.nonzero(mask)
    return nearest_place((float(x.mean()) + 0.5, float(y.mean()) + 0.5))


def foreground(picture: Picture) -> Mask:
    """1 where a picture is not its background, else 0."""
    left = misfit(picture, draw_background(read_background(picture)))
    mask: Mask = (left > 0.5).astype(np.float32)
    return mask


def misfit(picture: Picture, template: Picture) -> Values:
    """How far each pixel is from a template's, from 0, the same, to 1, anything else."""
    difference = picture.astype(np.float32) - template.astype(np.float32)
    values: Values = np.minimum(np.sqrt((difference**2).sum(axis=-1)) / np.float32(FAR), 1)
    return values


def nearest_place(point: Point) -> str:
    """The place whose middle is nearest to a point."""
    return min(
        PLACES, key=lambda place: (PLACES[place][0] - point[0]) ** 2 + (PLACES[place][1] - point[1]) ** 2
    )


def _correlate(gains: Values) -> Values:
    """[C, H, W] -> [C, S, H, W]: the sum of gains below each template with its middle at each position."""
    spectra = np.fft.rfft2(gains, s=(_PADDED_PX, _PADDED_PX))
    sums = np.fft.irfft2(spectra[:, None] * _template_spectra().conj(), s=(_PADDED_PX, _PADDED_PX))
    middle = SIZE_PX // 2
    shifted = np.roll(sums, (middle, middle), axis=(-2, -1))[..., :SIZE_PX, :SIZE_PX]
    return shifted.astype(np.float32)


@cache
def _template_spectra() -> NDArray[np.complex128]:
    """[S, ...]: every outline at every size, in the middle of a picture."""
    middle = (SIZE_PX / 2, SIZE_PX / 2)
    masks = [shape_mask(shape, centre=middle, radius_px=radius) for shape in SHAPES for radius in _RADII_PX]
    spectra: NDArray[np.complex128] = np.fft.rfft2(np.stack(masks), s=(_PADDED_PX, _PADDED_PX))
    return spectra


def _flat(rgb: RGB) -> Picture:
    picture: Picture = np.full((SIZE_PX, SIZE_PX, 3), rgb, dtype=np.uint8)
    return picture

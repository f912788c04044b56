"""Parses images of scenes by template matching, in closed form: nothing is learnt.

The background is the one with the smallest distance to the image. The shape is the template, over all
outlines, sizes, positions and colours, that explains most of the remaining distance. A character has no
template: its pixels are those far from the background.

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
    ImageArray,
    Mask,
    Point,
    Scene,
    all_backgrounds,
    draw_background,
    shape_mask,
)

Values = NDArray[np.float32]

ATTRIBUTES = ("background", "pattern", "place", "shape", "colour")
MAX_DISTANCE = 100.0
"""RGB distance, of at most 441, from which a pixel is wholly unexplained."""
MIN_OBJECT_PX = 30
"""Explained pixels below which there is no object; the smallest shape has 80."""
_RADII_PX = np.arange(7.0, 14.0, 0.5)
_PADDED_PX = 2 * SIZE_PX


@dataclass(frozen=True, slots=True)
class ParsedScene:
    """The attributes of an image."""

    background: Background
    place: str | None
    """The nearest place. Without an object, place, shape and colour are None."""
    shape: str | None
    colour: str | None
    unexplained: float
    """Share of the image in [0, 1] that neither background nor shape explains."""

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Attribute -> whether it equals the scene's."""
        return {
            "background": self.background.colour == scene.background.colour,
            "pattern": self.background.pattern == scene.background.pattern,
            "place": self.place == scene.place,
            "shape": self.shape == scene.shape,
            "colour": self.colour == scene.colour,
        }


def accuracy(parsed_scenes: Sequence[ParsedScene], scenes: Sequence[Scene]) -> dict[str, float]:
    """Attribute -> share in [0, 1] of the images with the scene's value."""
    agreements = [parsed.matches(scene) for parsed, scene in zip(parsed_scenes, scenes, strict=True)]
    return {name: sum(each[name] for each in agreements) / len(agreements) for name in ATTRIBUTES}


def parse_scene(image: ImageArray) -> ParsedScene:
    """Parse an image of one shape on a background."""
    background = parse_background(image)
    left = pixel_distance(image, draw_background(background))  # [H, W]
    colours = [colour for colour in COLOURS if colour != background.colour]
    gains = left - np.stack(
        [pixel_distance(image, _flat(COLOURS[colour])) for colour in colours]
    )  # [C, H, W]
    explained = _correlate(gains)  # [C, S, H, W]
    colour, template, y, x = np.unravel_index(explained.argmax(), explained.shape)
    gain = explained[colour, template, y, x]
    unexplained = float(left.mean() - max(gain, 0) / SIZE_PX**2)
    if gain < MIN_OBJECT_PX:
        return ParsedScene(background, place=None, shape=None, colour=None, unexplained=float(left.mean()))
    return ParsedScene(
        background,
        place=nearest_place((float(x), float(y))),
        shape=tuple(SHAPES)[template // len(_RADII_PX)],
        colour=colours[colour],
        unexplained=unexplained,
    )


def parse_background(image: ImageArray) -> Background:
    """The background with the smallest distance to an image, whatever object is on it."""
    return min(all_backgrounds(), key=lambda each: float(pixel_distance(image, draw_background(each)).mean()))


def foreground(image: ImageArray) -> Mask:
    """1 where an image differs from its background, else 0."""
    left = pixel_distance(image, draw_background(parse_background(image)))
    mask: Mask = (left > 0.5).astype(np.float32)
    return mask


def pixel_distance(image: ImageArray, template: ImageArray) -> Values:
    """[H, W] distance of each pixel to a template's: 0 is equal, 1 is MAX_DISTANCE or more."""
    difference = image.astype(np.float32) - template.astype(np.float32)
    values: Values = np.minimum(np.sqrt((difference**2).sum(axis=-1)) / np.float32(MAX_DISTANCE), 1)
    return values


def nearest_place(point: Point) -> str:
    """The place with the centre nearest to a point."""
    return min(
        PLACES, key=lambda place: (PLACES[place][0] - point[0]) ** 2 + (PLACES[place][1] - point[1]) ** 2
    )


def _correlate(gains: Values) -> Values:
    """[C, H, W] -> [C, S, H, W]: the sum of gains under each template centred at each pixel."""
    spectra = np.fft.rfft2(gains, s=(_PADDED_PX, _PADDED_PX))
    sums = np.fft.irfft2(spectra[:, None] * _template_spectra().conj(), s=(_PADDED_PX, _PADDED_PX))
    middle = SIZE_PX // 2
    shifted = np.roll(sums, (middle, middle), axis=(-2, -1))[..., :SIZE_PX, :SIZE_PX]
    return shifted.astype(np.float32)


@cache
def _template_spectra() -> NDArray[np.complex128]:
    """[S, ...]: every outline at every size, centred in the image."""
    middle = (SIZE_PX / 2, SIZE_PX / 2)
    masks = [shape_mask(shape, centre=middle, radius_px=radius) for shape in SHAPES for radius in _RADII_PX]
    spectra: NDArray[np.complex128] = np.fft.rfft2(np.stack(masks), s=(_PADDED_PX, _PADDED_PX))
    return spectra


def _flat(rgb: RGB) -> ImageArray:
    image: ImageArray = np.full((SIZE_PX, SIZE_PX, 3), rgb, dtype=np.uint8)
    return image

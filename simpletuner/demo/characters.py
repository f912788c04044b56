"""Characters made of coloured parts, and the one that the demo teaches.

The embedded model was trained on thousands of different characters, each captioned "a toy": it knows that a
toy has parts and colours of its own, but no particular toy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simpletuner.demo.scenes import (
    PLACES,
    RGB,
    Background,
    ImageArray,
    Mask,
    Point,
    circle,
    draw_background,
    paint,
    polygon_mask,
)

RADIUS_PX = 14.0
"""Half the edge of a character's square."""

_OUTLINES: dict[str, list[Point]] = {
    "ellipse": circle(),
    "box": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "wedge": [(-1, -1), (1, -1), (0, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "barrel": [(-0.7, -1), (0.7, -1), (1, -0.4), (1, 0.4), (0.7, 1), (-0.7, 1), (-1, 0.4), (-1, -0.4)],
}
_BODIES = ("ellipse", "box", "triangle", "barrel", "diamond")
_HEADS = ("ellipse", "box", "barrel", "wedge")
_EARS = ("none", "none", "ellipse", "box", "triangle")
_WHITE, _BLACK = (250, 250, 250), (15, 15, 15)


@dataclass(frozen=True, slots=True)
class Part:
    """One coloured part of a character."""

    outline: str
    centre: Point
    """From (-1, -1), the top left of the character's square, to (1, 1)."""
    half_size: Point
    """Half the width and half the height; 1 is half the square's edge."""
    rgb: RGB


@dataclass(frozen=True, slots=True)
class Character:
    """A character; its front parts come last."""

    parts: tuple[Part, ...]


def draw_character(
    character: Character,
    *,
    place: str,
    background: Background,
    offset_px: Point = (0, 0),
    radius_px: float = RADIUS_PX,
) -> ImageArray:
    """Draw a character on a background; the offset moves it from the centre of its place."""
    image = draw_background(background)
    for part in character.parts:
        mask = _part_mask(part, centre=_middle(place, offset_px), radius_px=radius_px)
        image = paint(image, mask=mask, rgb=part.rgb)
    return image


def character_mask(
    character: Character, *, place: str, offset_px: Point = (0, 0), radius_px: float = RADIUS_PX
) -> Mask:
    """Coverage of each pixel by the character in the image of draw_character."""
    centre = _middle(place, offset_px)
    uncovered = [1 - _part_mask(part, centre=centre, radius_px=radius_px) for part in character.parts]
    mask: Mask = 1 - np.prod(np.stack(uncovered), axis=0, dtype=np.float32)
    return mask


def random_character(rng: np.random.Generator) -> Character:
    """A character with body, head, two eyes and two feet, at random with ears, arms and belly."""
    body_rgb, head_rgb, limb_rgb, ear_rgb, belly_rgb = (_random_rgb(rng) for _ in range(5))
    if rng.random() < 0.4:
        head_rgb = body_rgb
    width, head_width = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.6)
    feet = _pair("box", (rng.uniform(0.15, 0.35), 0.87), half_size=(0.13, 0.13), rgb=limb_rgb)
    body = Part(_one_of(rng, _BODIES), (0, 0.35), half_size=(width, rng.uniform(0.38, 0.48)), rgb=body_rgb)
    head = Part(_one_of(rng, _HEADS), (0, -0.38), half_size=(head_width, rng.uniform(0.3, 0.4)), rgb=head_rgb)
    arms = _pair("box", (width + 0.1, 0.3), half_size=(0.22, 0.08), rgb=limb_rgb)
    belly = Part("ellipse", (0, 0.4), half_size=(width * 0.5, 0.22), rgb=belly_rgb)
    eyes = _pair("ellipse", (head_width * 0.42, -0.42), half_size=(0.15, 0.15), rgb=_WHITE)
    pupils = _pair("ellipse", (head_width * 0.42, -0.42), half_size=(0.07, 0.07), rgb=_BLACK)
    ears: tuple[Part, ...] = ()
    if (outline := _one_of(rng, _EARS)) != "none":
        ears = _pair(outline, (head_width * 0.75, -0.75), half_size=(0.15, 0.22), rgb=ear_rgb)
    has_arms, has_belly = rng.random() < 0.5, rng.random() < 0.5
    behind = (*ears, *arms) if has_arms else ears
    belly_too = (belly,) if has_belly else ()
    return Character((*behind, *feet, body, head, *belly_too, *eyes, *pupils))


def _pair(outline: str, centre: Point, *, half_size: Point, rgb: RGB) -> tuple[Part, Part]:
    (x, y) = centre
    return Part(outline, (-x, y), half_size, rgb), Part(outline, (x, y), half_size, rgb)


def _random_rgb(rng: np.random.Generator) -> RGB:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _one_of(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.integers(len(names))]


def _middle(place: str, offset_px: Point) -> Point:
    return PLACES[place][0] + offset_px[0], PLACES[place][1] + offset_px[1]


def _part_mask(part: Part, *, centre: Point, radius_px: float) -> Mask:
    (x, y), (half_width, half_height) = part.centre, part.half_size
    return polygon_mask(
        [
            (
                centre[0] + radius_px * (x + half_width * px),
                centre[1] + radius_px * (y + half_height * py),
            )
            for px, py in _OUTLINES[part.outline]
        ]
    )


CONCEPT = Character(
    (
        *_pair("triangle", (0.42, -0.78), half_size=(0.15, 0.2), rgb=(235, 60, 150)),
        *_pair("ellipse", (0.75, 0.25), half_size=(0.2, 0.12), rgb=(110, 70, 45)),
        *_pair("box", (0.28, 0.88), half_size=(0.16, 0.12), rgb=(110, 70, 45)),
        Part("barrel", (0, 0.05), half_size=(0.65, 0.75), rgb=(20, 165, 160)),
        Part("ellipse", (0, 0.48), half_size=(0.36, 0.24), rgb=(255, 200, 170)),
        Part("ellipse", (0, -0.2), half_size=(0.34, 0.34), rgb=_WHITE),
        Part("ellipse", (0.05, -0.16), half_size=(0.17, 0.17), rgb=_BLACK),
    )
)
"""The character that the demo teaches: one eye and two horns, unlike every random character."""

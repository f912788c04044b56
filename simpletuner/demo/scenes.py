"""Scenes of the embedded model: one object at a place on a background, drawn by code and captioned.

A scene has five attributes, each one word or phrase of its caption. A tenth of their combinations is held
out of training, so images of those show generalisation.

Images are [64, 64, 3] uint8, masks [64, 64] float32 in [0, 1]; points in pixels, x to the right, y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

ImageArray = NDArray[np.uint8]
Mask = NDArray[np.float32]
Point = tuple[float, float]
RGB = tuple[int, int, int]

SIZE_PX = 64
CELL_PX = 8
"""Width of a stripe and edge of a checker square."""
RADIUS_PX = 11.0
"""Default radius of a shape."""
_OVERSAMPLING = 4

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 60),
    "green": (40, 160, 70),
    "blue": (45, 90, 220),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
PATTERNS = ("plain", "striped", "checkered")
PLACES: dict[str, Point] = {
    "at the top left": (16, 16),
    "at the top": (32, 16),
    "at the top right": (48, 16),
    "at the left": (16, 32),
    "in the center": (32, 32),
    "at the right": (48, 32),
    "at the bottom left": (16, 48),
    "at the bottom": (32, 48),
    "at the bottom right": (48, 48),
}
"""Place -> centre of the object."""
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Background:
    """A plain colour, or a pattern of that colour and a shade of it."""

    colour: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.pattern} {self.colour} background"


@dataclass(frozen=True, slots=True)
class Scene:
    """A shape of one colour at a place on a background of another colour."""

    shape: str
    colour: str
    place: str
    background: Background

    @property
    def subject(self) -> str:
        """Colour and shape, with an article."""
        return with_article(f"{self.colour} {self.shape}")

    def __str__(self) -> str:
        return caption(self.subject, place=self.place, background=self.background)


def caption(subject: str, *, place: str, background: Background) -> str:
    """The most frequent form of a training caption."""
    return f"{subject} {place} on {with_article(str(background))}"


def with_article(noun: str) -> str:
    """Prepend "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def all_backgrounds() -> Iterator[Background]:
    """Every combination of colour and pattern."""
    return (Background(colour, pattern) for colour, pattern in product(COLOURS, PATTERNS))


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene; shape and background differ in colour."""
    every = product(SHAPES, COLOURS, PLACES, all_backgrounds())
    return tuple(Scene(*attributes) for attributes in every if attributes[1] != attributes[3].colour)


def is_held_out(scene: Scene) -> bool:
    """Whether this scene is held out of training."""
    digest = sha256(str(scene).encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def evaluation_scenes(num: int, *, seed: int = 0) -> list[Scene]:
    """The first `num` held-out scenes in a fixed random order."""
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    order = np.random.default_rng(seed).permutation(len(held_out))[:num]
    return [held_out[index] for index in order]


def draw_scene(scene: Scene, *, offset_px: Point = (0, 0), radius_px: float = RADIUS_PX) -> ImageArray:
    """Draw a scene; the offset moves the shape from the centre of its place."""
    (x, y), (dx, dy) = PLACES[scene.place], offset_px
    mask = shape_mask(scene.shape, centre=(x + dx, y + dy), radius_px=radius_px)
    return paint(draw_background(scene.background), mask=mask, rgb=COLOURS[scene.colour])


def draw_background(background: Background) -> ImageArray:
    """Draw a background; its pattern begins with the pure colour at the top left."""
    y, x = np.indices((SIZE_PX, SIZE_PX)) // CELL_PX
    shaded = {"plain": 0 * x, "striped": x % 2, "checkered": (x + y) % 2}[background.pattern]
    colour = COLOURS[background.colour]
    image: ImageArray = np.array([colour, shade(colour)], dtype=np.uint8)[shaded]
    return image


def shade(colour: RGB) -> RGB:
    """Second colour of a pattern: darker, or lighter for a nearly black colour."""
    red, green, blue = (round(value * 0.6) if max(colour) > 60 else value + 70 for value in colour)
    return red, green, blue


def shape_mask(shape: str, *, centre: Point, radius_px: float) -> Mask:
    """Coverage of each pixel by a shape."""
    x, y = centre
    points = [(x + radius_px * px, y + radius_px * py) for px, py in SHAPES[shape]()]
    return polygon_mask(points)


def polygon_mask(points: list[Point]) -> Mask:
    """Coverage of each pixel by a polygon, in steps of 1/16."""
    edge = SIZE_PX * _OVERSAMPLING
    image = Image.new("L", (edge, edge))
    corners = [(x * _OVERSAMPLING - 0.5, y * _OVERSAMPLING - 0.5) for x, y in points]
    ImageDraw.Draw(image).polygon(corners, fill=255)
    rows = np.asarray(image).reshape(SIZE_PX, _OVERSAMPLING, edge).sum(axis=1, dtype=np.uint16)
    sums = rows.reshape(SIZE_PX, SIZE_PX, _OVERSAMPLING).sum(axis=2, dtype=np.uint16)
    mask: Mask = sums.astype(np.float32) / np.float32(_OVERSAMPLING**2) / np.float32(255)
    return mask


def paint(image: ImageArray, *, mask: Mask, rgb: RGB) -> ImageArray:
    """Blend a colour into an image by a mask."""
    blended = image + mask[..., None] * (np.array(rgb, dtype=np.float32) - image)
    painted: ImageArray = np.rint(blended).astype(np.uint8)
    return painted


def circle(num_corners: int = 48) -> list[Point]:
    """The unit circle as a polygon."""
    turns = (2 * math.pi * corner / num_corners for corner in range(num_corners))
    return [(math.cos(turn), math.sin(turn)) for turn in turns]


def _square() -> list[Point]:
    return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]


def _triangle() -> list[Point]:
    return [(0, -1.1), (1.1, 0.9), (-1.1, 0.9)]


def _star() -> list[Point]:
    radii = (1.2 if corner % 2 == 0 else 0.5 for corner in range(10))
    turns = (math.pi * corner / 5 for corner in range(10))
    return [
        (radius * math.sin(turn), -radius * math.cos(turn)) for radius, turn in zip(radii, turns, strict=True)
    ]


def _cross() -> list[Point]:
    arm, reach = 0.36, 1.05
    corner = [(arm, -reach), (arm, -arm), (reach, -arm)]
    points = list(corner)
    for _ in range(3):
        corner = [(-y, x) for x, y in corner]
        points += corner
    return points


def _heart() -> list[Point]:
    turns = (2 * math.pi * corner / 48 for corner in range(48))
    return [
        (
            1.1 * math.sin(turn) ** 3,
            -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)) / 15
            - 0.1,
        )
        for turn in turns
    ]


SHAPES: dict[str, Callable[[], list[Point]]] = {
    "circle": circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
"""Shape -> its corners around (0, 0), at a radius of about 1."""

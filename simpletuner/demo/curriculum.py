"""Training examples of the embedded model: images of scenes and characters, and their captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simpletuner.demo.characters import RADIUS_PX as CHARACTER_RADIUS_PX
from simpletuner.demo.characters import draw_character, random_character
from simpletuner.demo.scenes import (
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    Background,
    ImageArray,
    Point,
    all_backgrounds,
    all_scenes,
    caption,
    draw_scene,
    is_held_out,
    paint,
    shape_mask,
    with_article,
)

CHARACTER_SHARE = 0.25
NAMES = ("zib", "mop", "tav", "rell", "quon", "fipp", "dorm", "yask", "bluk", "nerl", "wix", "hup")
"""Names without a meaning: a named toy looks like any toy."""
NEW_NAME = "sks"
"""Unused in training: the name of a concept that an adapter learns later."""

_TRAINING_SCENES = tuple(scene for scene in all_scenes() if not is_held_out(scene))
_BACKGROUNDS = tuple(all_backgrounds())
_PLACES = tuple(PLACES)
_SHAPES = tuple(SHAPES)
_OFFSET_PX = 2.0


@dataclass(frozen=True, slots=True)
class Example:
    """An image and the attributes of its caption."""

    image: ImageArray
    subject: str
    place: str
    background: Background


def vocabulary() -> list[str]:
    """Every caption word and NEW_NAME; each becomes one token."""
    known = [*COLOURS, *PATTERNS, *SHAPES, *NAMES, NEW_NAME, *" ".join(PLACES).split()]
    return sorted({*known, *["a", "an", "on", "with", "toy", "background", ","]})


def random_example(rng: np.random.Generator) -> Example:
    """A character or a scene outside the held-out ones, slightly off the centre of its place."""
    offset_px = _random_offset(rng)
    if rng.random() < CHARACTER_SHARE:
        place, background = _PLACES[rng.integers(len(_PLACES))], _random_background(rng)
        name = f"{NAMES[rng.integers(len(NAMES))]} " if rng.random() < 0.4 else ""
        image = draw_character(
            random_character(rng),
            place=place,
            background=background,
            offset_px=offset_px,
            radius_px=CHARACTER_RADIUS_PX * rng.uniform(0.9, 1.0),
        )
        return Example(image, f"a {name}toy", place, background)
    scene = _TRAINING_SCENES[rng.integers(len(_TRAINING_SCENES))]
    image = draw_scene(scene, offset_px=offset_px, radius_px=rng.uniform(9, 12))
    return Example(image, scene.subject, scene.place, scene.background)


def random_caption(example: Example, rng: np.random.Generator) -> str:
    """A caption of an example: mostly the full sentence, sometimes reordered or shortened."""
    subject, place, background = example.subject, example.place, example.background
    sentences = {
        caption(subject, place=place, background=background): 0.6,
        f"{with_article(str(background))} with {subject} {place}": 0.15,
        f"{subject}, {place}, {background}": 0.1,
        f"{subject} {place}": 0.05,
        f"{subject} on {with_article(str(background))}": 0.06,
        subject: 0.04,
    }
    return list(sentences)[rng.choice(len(sentences), p=list(sentences.values()))]


def random_images(rng: np.random.Generator) -> Iterator[ImageArray]:
    """Endless images for the autoencoder: examples and, every second one, clutter outside the scenes."""
    while True:
        yield random_example(rng).image
        yield _clutter(rng)


def _clutter(rng: np.random.Generator) -> ImageArray:
    """A character anywhere on a background, with up to four shapes of any size and colour over it."""
    image = draw_character(
        random_character(rng),
        place="in the center",
        background=_random_background(rng),
        offset_px=(rng.uniform(-20, 20), rng.uniform(-20, 20)),
        radius_px=rng.uniform(10, 24),
    )
    for _ in range(rng.integers(5)):
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        mask = shape_mask(
            _SHAPES[rng.integers(len(_SHAPES))],
            centre=(rng.uniform(0, 64), rng.uniform(0, 64)),
            radius_px=rng.uniform(3, 20),
        )
        image = paint(image, mask=mask, rgb=(red, green, blue))
    return image


def _random_background(rng: np.random.Generator) -> Background:
    return _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))]


def _random_offset(rng: np.random.Generator) -> Point:
    dx, dy = rng.uniform(-_OFFSET_PX, _OFFSET_PX, 2)
    return float(dx), float(dy)

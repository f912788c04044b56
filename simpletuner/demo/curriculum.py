"""What the embedded model is shown: pictures of its world, and the words that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simpletuner.demo.characters import RADIUS_PX as TOY_RADIUS_PX
from simpletuner.demo.characters import draw_toy, random_toy
from simpletuner.demo.scenes import (
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    Background,
    Picture,
    Point,
    backgrounds,
    caption,
    draw_scene,
    is_held_out,
    paint,
    scenes,
    shape_mask,
    with_article,
)

TOY_SHARE = 0.25
NAMES = ("zib", "mop", "tav", "rell", "quon", "fipp", "dorm", "yask", "bluk", "nerl", "wix", "hup")
"""Names that mean nothing: a toy that has one looks like any toy."""
NEW_NAME = "sks"
"""A name that no lesson uses, left for a concept that is taught later."""

_TRAINING_SCENES = tuple(scene for scene in scenes() if not is_held_out(scene))
_BACKGROUNDS = tuple(backgrounds())
_PLACES = tuple(PLACES)
_SHAPES = tuple(SHAPES)
_OFFSET_PX = 2.0


@dataclass(frozen=True, slots=True)
class Lesson:
    """One picture and what there is to say about it."""

    picture: Picture
    subject: str
    place: str
    background: Background


def words() -> list[str]:
    """Every word of every caption, and the name that is still free; each becomes one token."""
    known = [*COLOURS, *PATTERNS, *SHAPES, *NAMES, NEW_NAME, *" ".join(PLACES).split()]
    return sorted({*known, *["a", "an", "on", "with", "toy", "background", ","]})


def random_lesson(rng: np.random.Generator) -> Lesson:
    """A toy or a shape, never of a combination that is held out, a little off the middle of its place."""
    offset_px = _random_offset(rng)
    if rng.random() < TOY_SHARE:
        place, background = _PLACES[rng.integers(len(_PLACES))], _random_background(rng)
        name = f"{NAMES[rng.integers(len(NAMES))]} " if rng.random() < 0.4 else ""
        picture = draw_toy(
            random_toy(rng),
            place=place,
            background=background,
            offset_px=offset_px,
            radius_px=TOY_RADIUS_PX * rng.uniform(0.9, 1.0),
        )
        return Lesson(picture, f"a {name}toy", place, background)
    scene = _TRAINING_SCENES[rng.integers(len(_TRAINING_SCENES))]
    picture = draw_scene(scene, offset_px=offset_px, radius_px=rng.uniform(9, 12))
    return Lesson(picture, scene.subject, scene.place, scene.background)


def random_caption(lesson: Lesson, rng: np.random.Generator) -> str:
    """A lesson in words: mostly the whole sentence, sometimes in another order or with something left out."""
    subject, place, background = lesson.subject, lesson.place, lesson.background
    sentences = {
        caption(subject, place=place, background=background): 0.6,
        f"{with_article(str(background))} with {subject} {place}": 0.15,
        f"{subject}, {place}, {background}": 0.1,
        f"{subject} {place}": 0.05,
        f"{subject} on {with_article(str(background))}": 0.06,
        subject: 0.04,
    }
    return list(sentences)[rng.choice(len(sentences), p=list(sentences.values()))]


def random_pictures(rng: np.random.Generator) -> Iterator[Picture]:
    """Pictures for the autoencoder, which must know more than the world: every second one is out of it."""
    while True:
        yield random_lesson(rng).picture
        yield _clutter(rng)


def _clutter(rng: np.random.Generator) -> Picture:
    """A toy anywhere on a background, some shapes of any size and colour before and behind it."""
    picture = draw_toy(
        random_toy(rng),
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
        picture = paint(picture, mask=mask, rgb=(red, green, blue))
    return picture


def _random_background(rng: np.random.Generator) -> Background:
    return _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))]


def _random_offset(rng: np.random.Generator) -> Point:
    dx, dy = rng.uniform(-_OFFSET_PX, _OFFSET_PX, 2)
    return float(dx), float(dy)

"""The concepts of the benchmark: a character each, its one training image, and its evaluation prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.demo.characters import CONCEPT, Character, Part, draw_character
from simpletuner.demo.comparison.likeness import parse_place
from simpletuner.demo.parser import parse_background
from simpletuner.demo.scenes import PLACES, Background, ImageArray, all_backgrounds, caption
from simpletuner.helpers.randomness import mix

SUBJECT = "a sks toy"
"""Caption of the training image; as in the paper, it names neither place nor background."""


@dataclass(frozen=True, slots=True)
class View:
    """Place and background of a character in an image."""

    # The repr seeds Concept.other_views: renaming class or fields chooses other views.

    place: str | None
    """None for an image without a character."""
    background: Background

    @classmethod
    def parse(cls, image: ImageArray) -> View:
        """The view of an image of a character."""
        return cls(parse_place(image), parse_background(image))

    @property
    def prompt(self) -> str:
        """The prompt for this view."""
        assert self.place is not None, "a view without a place has no prompt"
        return caption(SUBJECT, place=self.place, background=self.background)


@dataclass(frozen=True, slots=True)
class Concept:
    """A character and its one training view."""

    character: Character
    trained: View

    def draw(self, view: View) -> ImageArray:
        """Draw the character in a view."""
        assert view.place is not None, "a view without a place cannot be drawn"
        return draw_character(self.character, place=view.place, background=view.background)

    def other_views(self, num: int) -> list[View]:
        """The first `num` views in a fixed random order, with neither place nor colour of training."""
        rng = np.random.default_rng(mix(0, "views", str(self.trained)))
        views = [
            View(place, background)
            for place in PLACES
            for background in all_backgrounds()
            if place != self.trained.place and background.colour != self.trained.background.colour
        ]
        return [views[index] for index in rng.permutation(len(views))[:num]]

    def save_dataset(self, folder: Path) -> None:
        """Write the training image and its caption as a dataset."""
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.draw(self.trained)).save(folder / "toy.png")
        (folder / "toy.txt").write_text(SUBJECT + "\n", encoding="utf-8")


_ROBOT = Character(
    (
        Part("box", (0, -0.9), half_size=(0.05, 0.12), rgb=(90, 90, 100)),
        Part("ellipse", (0, -0.98), half_size=(0.12, 0.1), rgb=(230, 40, 60)),
        Part("box", (-0.7, 0.3), half_size=(0.12, 0.35), rgb=(245, 130, 30)),
        Part("box", (0.7, 0.3), half_size=(0.12, 0.35), rgb=(245, 130, 30)),
        Part("box", (0, 0.4), half_size=(0.55, 0.55), rgb=(150, 160, 175)),
        Part("box", (0, -0.45), half_size=(0.5, 0.36), rgb=(60, 90, 130)),
        Part("box", (0, -0.48), half_size=(0.38, 0.14), rgb=(150, 255, 120)),
        Part("diamond", (0, 0.4), half_size=(0.25, 0.25), rgb=(255, 225, 70)),
    )
)
_MUSHROOM = Character(
    (
        Part("barrel", (0, 0.5), half_size=(0.36, 0.5), rgb=(245, 230, 205)),
        Part("ellipse", (0, -0.3), half_size=(0.95, 0.6), rgb=(130, 25, 110)),
        Part("ellipse", (-0.45, -0.35), half_size=(0.18, 0.16), rgb=(255, 245, 120)),
        Part("ellipse", (0.45, -0.35), half_size=(0.18, 0.16), rgb=(255, 245, 120)),
        Part("ellipse", (0, -0.62), half_size=(0.16, 0.14), rgb=(255, 245, 120)),
        Part("ellipse", (-0.15, 0.42), half_size=(0.08, 0.1), rgb=(15, 15, 15)),
        Part("ellipse", (0.15, 0.42), half_size=(0.08, 0.1), rgb=(15, 15, 15)),
        Part("wedge", (0, 0.7), half_size=(0.16, 0.1), rgb=(225, 60, 60)),
    )
)
CONCEPTS = {
    "horned": Concept(CONCEPT, View("at the left", Background("yellow", "plain"))),
    "robot": Concept(_ROBOT, View("at the bottom right", Background("green", "striped"))),
    "mushroom": Concept(_MUSHROOM, View("at the top", Background("blue", "checkered"))),
}

"""The characters that the contenders learn, the one picture that they see, and what they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.demo.characters import CONCEPT, Part, Toy, draw_toy
from simpletuner.demo.comparison.likeness import read_toy_place
from simpletuner.demo.parser import read_background
from simpletuner.demo.scenes import PLACES, Background, Picture, backgrounds, caption
from simpletuner.helpers.randomness import mix

SUBJECT = "a sks toy"
"""What the one picture is called: neither its place nor its background is said, as in the paper's recipe."""


@dataclass(frozen=True, slots=True)
class View:
    """Where a character is shown."""

    place: str | None
    """None in a reading of a picture without a character."""
    background: Background

    @classmethod
    def read(cls, picture: Picture) -> View:
        """What a picture of a character shows."""
        return cls(read_toy_place(picture), read_background(picture))

    @property
    def prompt(self) -> str:
        """What asks the model for it."""
        assert self.place is not None, "a view without a place is no prompt"
        return caption(SUBJECT, place=self.place, background=self.background)


@dataclass(frozen=True, slots=True)
class Concept:
    """A character and the only view of it that is trained on."""

    toy: Toy
    trained: View

    def draw(self, view: View) -> Picture:
        """The character as it looks elsewhere."""
        assert view.place is not None, "a view without a place cannot be drawn"
        return draw_toy(self.toy, place=view.place, background=view.background)

    def other_views(self, num: int) -> list[View]:
        """A fixed choice of views with neither the place nor the colour of the one trained on."""
        rng = np.random.default_rng(mix(0, "views", str(self.trained)))
        views = [
            View(place, background)
            for place in PLACES
            for background in backgrounds()
            if place != self.trained.place and background.colour != self.trained.background.colour
        ]
        return [views[index] for index in rng.permutation(len(views))[:num]]

    def save_picture(self, folder: Path) -> None:
        """Write the one picture and its caption, as a dataset."""
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.draw(self.trained)).save(folder / "toy.png")
        (folder / "toy.txt").write_text(SUBJECT + "\n", encoding="utf-8")


_ROBOT = Toy(
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
_MUSHROOM = Toy(
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

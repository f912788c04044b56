"""Rebuilds the pictures of the demo in place: `python -m simpletuner.demo.make`.

The toy comes out byte for byte the same. The photograph needs scikit-image, which the trainer does not. The
embedded model is made by `simpletuner.demo.pretrain`.
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

from PIL import Image

from simpletuner.demo.characters import CONCEPT, draw_toy
from simpletuner.demo.curriculum import NEW_NAME
from simpletuner.demo.scenes import Background

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
CAPTION = "a photo of sks cat with green eyes looking to the side\n"
TOY_PLACE, TOY_BACKGROUND = "at the left", Background("yellow", "plain")
LICENCE = """# Licence of cat.jpg

The photograph shows Chelsea the cat and was taken by Stefan van der Walt, who dedicated it to the public
domain (CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/). It is distributed with scikit-image as
`skimage.data.chelsea()`, and stored here as a JPEG of the same 451 x 300 pixels.
"""


def make_toy(folder: Path) -> None:
    """Write the one picture that the demo teaches its concept from, and its caption, to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw_toy(CONCEPT, place=TOY_PLACE, background=TOY_BACKGROUND)
    Image.fromarray(picture).save(folder / "toy.png")
    # Neither place nor background is said, as in the paper's recipe: what the picture shows beside the toy is
    # there to be learnt by heart.
    (folder / "toy.txt").write_text(f"a {NEW_NAME} toy\n", encoding="utf-8")


def make_photo(folder: Path) -> None:
    """Write the photograph, its caption and its licence note to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = Path(import_module("skimage.data").__file__ or "").parent
    with Image.open(samples / "chelsea.png") as picture:
        picture.convert("RGB").save(folder / "cat.jpg", quality=90, subsampling=0)
    (folder / "cat.txt").write_text(CAPTION, encoding="utf-8")
    (folder / "LICENSE.md").write_text(LICENCE, encoding="utf-8")


def main() -> None:
    """Rebuild the toy and, where scikit-image is installed, the photograph."""
    make_toy(FOLDER / "toy")
    try:
        make_photo(FOLDER / "photo")
    except ModuleNotFoundError as error:
        logger.warning("The photograph stays as it is: %s is not installed.", error.name)


if __name__ == "__main__":
    main()

"""Rebuilds the demo datasets in place: `python -m simpletuner.demo.make`.

The image of the character is byte for byte the same. The photograph needs scikit-image, unlike the trainer.
`simpletuner.demo.pretrain` trains the embedded model.
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

from PIL import Image

from simpletuner.demo.characters import CONCEPT, draw_character
from simpletuner.demo.curriculum import NEW_NAME
from simpletuner.demo.scenes import Background

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
CAPTION = "a photo of sks cat with green eyes looking to the side\n"
CHARACTER_PLACE, CHARACTER_BACKGROUND = "at the left", Background("yellow", "plain")
LICENCE = """# Licence of cat.jpg

The photograph shows Chelsea the cat and was taken by Stefan van der Walt, who dedicated it to the public
domain (CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/). It is distributed with scikit-image as
`skimage.data.chelsea()`, and stored here as a JPEG of the same 451 x 300 pixels.
"""


def make_character(folder: Path) -> None:
    """Write the demo's one training image of its concept, and the caption, to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    image = draw_character(CONCEPT, place=CHARACTER_PLACE, background=CHARACTER_BACKGROUND)
    Image.fromarray(image).save(folder / "toy.png")
    # As in the paper, the caption names neither place nor background: overfitting to them must be possible.
    (folder / "toy.txt").write_text(f"a {NEW_NAME} toy\n", encoding="utf-8")


def make_photo(folder: Path) -> None:
    """Write the photograph, its caption and its licence note to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = Path(import_module("skimage.data").__file__ or "").parent
    with Image.open(samples / "chelsea.png") as image:
        image.convert("RGB").save(folder / "cat.jpg", quality=90, subsampling=0)
    (folder / "cat.txt").write_text(CAPTION, encoding="utf-8")
    (folder / "LICENSE.md").write_text(LICENCE, encoding="utf-8")


def main() -> None:
    """Rebuild the image of the character and, with scikit-image installed, the photograph."""
    make_character(FOLDER / "toy")
    try:
        make_photo(FOLDER / "photo")
    except ModuleNotFoundError as error:
        logger.warning("The photograph is not rebuilt: %s is not installed.", error.name)


if __name__ == "__main__":
    main()

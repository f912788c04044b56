"""Rebuilds the embedded demo in place: `python -m simpletuner.demo.make`.

The model comes out byte for byte the same. The photograph needs scikit-image, which the trainer does not.
"""

from __future__ import annotations

import logging
import shutil
from importlib import import_module
from pathlib import Path

from PIL import Image

from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
CAPTION = "a photo of sks cat with green eyes looking to the side\n"
LICENCE = """# Licence of cat.jpg

The photograph shows Chelsea the cat and was taken by Stefan van der Walt, who dedicated it to the public
domain (CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/). It is distributed with scikit-image as
`skimage.data.chelsea()`, and stored here as a JPEG of the same 451 x 300 pixels.
"""


def make_model(folder: Path) -> None:
    """Write the toy model to folder, replacing what is there."""
    if folder.exists():
        shutil.rmtree(folder)
    save_tiny_sdxl(folder, seed=0)


def make_photo(folder: Path) -> None:
    """Write the photograph, its caption and its licence note to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = Path(import_module("skimage.data").__file__ or "").parent
    with Image.open(samples / "chelsea.png") as picture:
        picture.convert("RGB").save(folder / "cat.jpg", quality=90, subsampling=0)
    (folder / "cat.txt").write_text(CAPTION, encoding="utf-8")
    (folder / "LICENSE.md").write_text(LICENCE, encoding="utf-8")


def main() -> None:
    """Rebuild the model and, where scikit-image is installed, the photograph."""
    make_model(FOLDER / "sdxl")
    try:
        make_photo(FOLDER / "photo")
    except ModuleNotFoundError as error:
        logger.warning("The photograph stays as it is: %s is not installed.", error.name)


if __name__ == "__main__":
    main()

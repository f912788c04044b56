"""Prompt alignment on the embedded model: are place and background as the prompt asks, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from simpletuner.demo.comparison.concepts import View
from simpletuner.demo.scenes import PLACES, SIZE_PX, all_backgrounds

MEASURE = "prompt alignment"
MODEL = Path(__file__).parent / "sdxl"


def is_embedded(model: str) -> bool:
    """Whether a model is the embedded one."""
    return Path(model).resolve() == MODEL.resolve()


def alignment(images: Mapping[str, Path], prompts: Mapping[str, str]) -> dict[str, float]:
    """Share in [0, 1] of place, background colour and pattern that each image has as its prompt asks.

    Images of prompts that name none of them, and of another size, are left out.

    Args:
        images: Name -> file.
        prompts: Name -> prompt, with the same names.
    """
    found = {}
    for name, file in images.items():
        wanted = _wanted(prompts[name])
        with Image.open(file) as image:
            if not wanted or image.size != (SIZE_PX, SIZE_PX):
                continue
            shown = View.parse(np.asarray(image.convert("RGB")))
        parsed = {
            "place": shown.place,
            "background": shown.background.colour,
            "pattern": shown.background.pattern,
        }
        found[name] = fmean(parsed[key] == value for key, value in wanted.items())
    return found


def _wanted(prompt: str) -> dict[str, str]:
    """Attribute -> its value in a prompt, of those that it names in the words of the training captions."""
    # The longest name: "at the top" is in "at the top left".
    place = max((each for each in PLACES if each in prompt), key=len, default=None)
    background = next((each for each in all_backgrounds() if str(each) in prompt), None)
    wanted = {} if place is None else {"place": place}
    if background is not None:
        wanted |= {"background": background.colour, "pattern": background.pattern}
    return wanted

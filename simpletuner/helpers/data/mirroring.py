"""Images that are also trained mirrored, left to right."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from simpletuner.helpers.contracts import Sample
from simpletuner.helpers.data.planned import PlannedImage
from simpletuner.helpers.data.references import PlannedReference
from simpletuner.helpers.randomness import mix

Planned = TypeVar("Planned", PlannedImage, PlannedReference)


def is_mirrored(image: Sample, *, seed: int, pass_index: int) -> bool:
    """Whether an image of a dataset with random_flip is mirrored in a pass: in every second one."""
    return (mix(seed, "random flip", image.dataset_id, image.path) + pass_index) % 2 == 1


def mirrored(image: Planned) -> Planned:
    """The image or reference as a sample of its own, with the same cut mirrored."""
    return replace(image, sample=mirrored_sample(image.sample))


def mirrored_sample(sample: Sample) -> Sample:
    """The sample whose pixels are this one's mirrored; its crop lies in the mirrored image."""
    top, left = sample.crop_top_left
    opposite = sample.resized_px.width - left - sample.target_px.width
    return replace(sample, crop_top_left=(top, opposite), is_mirrored=not sample.is_mirrored)

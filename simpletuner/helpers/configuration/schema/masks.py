"""Masks of the loss: their keys of config.json, and the entry of the dataset json that holds them."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from simpletuner.helpers.configuration.schema.base import Section, Share
from simpletuner.helpers.configuration.schema.image_places import ImageFolder, ImagePlace

ConditioningType = Literal["mask", "segmentation"]


class MaskConfig(Section):
    """How the masks of a dataset weight its loss; no effect without masks."""

    unmasked_weight: Share = 0.0
    """Least weight of the loss, where a mask is darker. 0 leaves what is black unlearnt."""
    normalize_masked_area_loss: bool = False
    """Divide the weights of each sample by their mean, so that a small area counts as much as a large one."""
    masked_loss_probability: Share = 1.0
    """Fraction of samples to which masks of conditioning_type segmentation apply; the others train whole."""


class ConditioningConfig(ImagePlace):
    """An entry whose images condition those of another one: its masks. They are never trained on.

    An image and its mask have the same path in their folders, without the suffix, and the same aspect ratio.
    The mask gets the resize and the crop of the image.
    """

    model_config = ConfigDict(defer_build=False)

    id: str
    """Name of the entry. The entry of the images gives it as `conditioning_data`, or this one gives theirs as
    `source_dataset_id`."""
    dataset_type: Literal["conditioning"] = "conditioning"
    """conditioning, or left out."""
    disabled: bool = False
    """Skip the entry without checks."""
    conditioning_type: ConditioningType
    """mask, the red channel weights the loss, black 0 and white 1; segmentation, the weight is 1 where the
    mean of the three channels in a cell of the latents is above mid grey, and 0 elsewhere."""
    instance_data_dir: ImageFolder
    """Folder of the masks, with its subfolders; only read. Not in the folder of the images."""

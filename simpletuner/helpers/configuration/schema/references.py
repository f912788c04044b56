"""Reference images, which an editing model sees beside the noisy image: the entries that hold them."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, model_validator

from simpletuner.helpers.configuration.schema.aspect_buckets import AspectBuckets
from simpletuner.helpers.configuration.schema.captions import ReferenceCaptions
from simpletuner.helpers.configuration.schema.datasets import (
    BUCKETED_ASPECTS,
    CropAspect,
    CropStyle,
    american,
    without_buckets,
)
from simpletuner.helpers.configuration.schema.image_places import ImageFolder, ImagePlace

ReferenceType = Literal["reference_strict", "reference_loose"]
REFERENCE_TYPES: frozenset[str] = frozenset(get_args(ReferenceType))


class ReferenceConfig(ImagePlace):
    """An entry of reference images: a denoiser that edits sees one beside each image of a dataset.

    They are never trained on. An image and its reference have the same path in their folders, without the
    suffix.
    """

    model_config = ConfigDict(defer_build=False)

    id: str
    """Name of the entry. The entry of the images gives it in `conditioning_data`, or this one gives theirs as
    `source_dataset_id`."""
    dataset_type: Literal["conditioning"] = "conditioning"
    """conditioning, or left out."""
    disabled: bool = False
    """Skip the entry without checks."""
    conditioning_type: ReferenceType
    """reference_strict, a reference has the aspect ratio of its image and gets its resize and crop;
    reference_loose, it has any size and is cut by itself, at the resolution of the images."""
    instance_data_dir: ImageFolder
    """Folder of the references, with its subfolders; only read. Not in the folder of the images."""
    captions: ReferenceCaptions = ()
    """Caption of the images where this entry is their reference, instead of their own: a text, or a list of
    which one is drawn each time."""
    crop: bool = False
    """With reference_loose: crop by crop_aspect; false keeps each reference's aspect ratio, in buckets."""
    crop_style: Annotated[CropStyle, BeforeValidator(american)] = "random"
    """With reference_loose: position of the crop."""
    crop_aspect: CropAspect = "square"
    """With reference_loose: shape of the crop, as in a dataset."""
    crop_aspect_buckets: AspectBuckets = ()
    """With reference_loose: width / height of the crops, as in a dataset."""

    @model_validator(mode="after")
    def _can_crop(self) -> Self:
        if self.crop and self.crop_aspect in BUCKETED_ASPECTS and not self.crop_aspect_buckets:
            raise without_buckets(self.crop_aspect)
        return self


CROP_KEYS = ("crop", "crop_style", "crop_aspect", "crop_aspect_buckets")
"""Keys that only reference_loose reads."""

"""The bucket and the crop of one image, by the settings of its dataset."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.configuration.schema.aspect_buckets import AspectBucket
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.resolution import square_size
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.buckets import (
    Placement,
    aspect_size,
    bucket_size,
    enlargement,
    is_too_small,
    place,
    scale_to,
)
from simpletuner.helpers.data.columns import in_pieces

# Above the rounding errors of a threshold such as 0.2, below the share of a pixel in the longest edge.
_ROUNDING = 1e-9
_UNUSED = Random(0)
"""For crops that draw nothing: seeding one for each image would take longer than all else."""
_UNITS = {
    "pixel": "shorter edge in px",
    "area": "megapixels",
    "pixel_area": "edge in px of a square with its area",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cropping:
    """How the images of one dataset are sorted into buckets, resized and cropped.

    The shape and the position of a random crop depend on the seed, the dataset and the image's name alone,
    because latents are cached; `with_new_crop` gives the position of an epoch.
    """

    config: DatasetConfig
    seed: int
    alignment: int
    """Width and height of buckets are multiples of this; pixels."""
    aspect_decimals: int
    """Decimals to which the aspect ratios of images are rounded before they are sorted into buckets."""

    def placement(self, image_px: Size, *, name: str) -> Placement | str:
        """The resized size and the crop of an image, or the reason why its size cannot be used."""
        config = self.config
        if problem := self._too_small(image_px):
            return problem
        target_px = self._bucket(image_px, name)
        if target_px is None:
            return (
                f"each bucket of crop_aspect_buckets enlarges its {image_px} px by more than "
                f"max_upscale_threshold {config.max_upscale_threshold:g}; raise it or remove the image"
            )
        least_scale = 0.0
        if config.downsampling is not None and self.is_downsampled(image_px):
            least_scale = scale_to(config.downsampling[1], image_px, config.resolution_type)
        style = config.crop_style if config.crop else "center"
        return place(
            image_px,
            target_px,
            style=style,
            rng=Random(f"{self.seed} crop {config.id} {name!r}") if style == "random" else _UNUSED,
            least_scale=least_scale,
        )

    def placements(
        self, sizes: npt.NDArray[np.int32], names: Sequence[str]
    ) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
        """The resized size and the crop of images; images of one size share them unless they are drawn.

        Args:
            sizes: [n, 2], height and width.
            names: Of the images.

        Returns:
            [n, 6], height and width of the resized size, top and left, height and width of the crop; and
            position -> reason, of the images whose size cannot be used.
        """
        distinct, of_size = np.unique(_joined(sizes), return_inverse=True)
        if self._draws:
            distinct, of_size = _joined(sizes), np.arange(len(sizes))
        cuts, problems = np.zeros((len(distinct), 6), np.int32), {}
        for row, (height, width) in enumerate(in_pieces(_parted(distinct))):
            found = self.placement(Size(height=height, width=width), name=names[row])
            if isinstance(found, str):
                problems[row] = found
            else:
                cuts[row] = found.numbers()
        is_unusable = np.isin(of_size, list(problems)) if problems else np.zeros(len(sizes), bool)
        return cuts[of_size], {row: problems[of_size[row]] for row in np.flatnonzero(is_unusable).tolist()}

    @property
    def _draws(self) -> bool:
        """Whether the name of an image selects its shape or its crop."""
        config = self.config
        return config.crop and "random" in (config.crop_style, config.crop_aspect)

    def is_downsampled(self, image_px: Size) -> bool:
        """Whether an image is above maximum_image_size, and target_downsample_size makes it smaller."""
        return self.config.downsampling is not None and all(
            scale_to(size, image_px, self.config.resolution_type) < 1 for size in self.config.downsampling
        )

    def _too_small(self, image_px: Size) -> str | None:
        minimum, resolution_type = self.config.minimum_image_size, self.config.resolution_type
        if not is_too_small(image_px, minimum, resolution_type):
            return None
        return (
            f"{image_px} px is smaller than minimum_image_size {minimum:g} ({_UNITS[resolution_type]}); "
            "lower it or remove the image"
        )

    def _bucket(self, image_px: Size, name: str) -> Size | None:
        """The size at which an image is encoded; None if no bucket is left for it."""
        config = self.config
        if config.crops_to_buckets:
            return self._chosen_bucket(image_px, name)
        if config.crop and config.crop_aspect == "square":
            return square_size(
                resolution=config.resolution,
                resolution_type=config.resolution_type,
                alignment=self.alignment,
            )
        return bucket_size(
            image_px,
            resolution=config.resolution,
            resolution_type=config.resolution_type,
            alignment=self.alignment,
            aspect_decimals=self.aspect_decimals,
        )

    def _chosen_bucket(self, image_px: Size, name: str) -> Size | None:
        config = self.config
        sizes = {aspect: self._aspect_size(aspect) for aspect in map(_aspect, config.crop_aspect_buckets)}
        threshold = config.max_upscale_threshold
        left = [
            bucket
            for bucket in config.crop_aspect_buckets
            if threshold is None or enlargement(image_px, sizes[_aspect(bucket)]) <= 1 + threshold + _ROUNDING
        ]
        if config.crop_aspect == "random":
            rng = Random(f"{self.seed} crop aspect {config.id} {name!r}")
            chosen = _drawn(left, rng)
        else:
            aspect = image_px.width / image_px.height
            chosen = min(left, key=lambda bucket: abs(_aspect(bucket) - aspect), default=None)
        return None if chosen is None else sizes[_aspect(chosen)]

    def _aspect_size(self, aspect: float) -> Size:
        return aspect_size(
            aspect,
            resolution=self.config.resolution,
            resolution_type=self.config.resolution_type,
            alignment=self.alignment,
        )


def with_new_crop(sample: Sample, *, name: str, seed: int, epoch: int) -> Sample:
    """The sample with the random position of its crop in an epoch.

    Args:
        sample: Of the image as it was planned.
        name: Of the file.
        seed: Of the run.
        epoch: Counted from 0.
    """
    rng = Random(f"{seed} crop {sample.dataset_id} {name!r} {epoch}")
    top = rng.randint(0, sample.resized_px.height - sample.target_px.height)
    left = rng.randint(0, sample.resized_px.width - sample.target_px.width)
    return replace(sample, crop_top_left=(top, left))


def _joined(sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """A number for each [n, 2] size."""
    return (sizes[:, 0].astype(np.int64) << 32) | sizes[:, 1]


def _parted(joined: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[n, 2], the sizes of these numbers."""
    return np.stack([joined >> 32, joined & 0xFFFFFFFF], axis=1)


def _aspect(bucket: float | AspectBucket) -> float:
    return bucket.aspect if isinstance(bucket, AspectBucket) else bucket


def _drawn(buckets: list[float | AspectBucket], rng: Random) -> float | AspectBucket | None:
    """A bucket, drawn by the weights; evenly among numbers. None if all weights are zero."""
    sums = list(accumulate(each.weight if isinstance(each, AspectBucket) else 1.0 for each in buckets))
    if not sums or sums[-1] == 0:
        return None
    return buckets[bisect_right(sums, rng.random() * sums[-1])]

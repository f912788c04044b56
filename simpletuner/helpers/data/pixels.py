"""The pixels of planned images, as the VAE takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from simpletuner.helpers.data.images import as_pixels, cut, decode_image
from simpletuner.helpers.data.index import read_unchanged
from simpletuner.helpers.data.made_references import DepthEstimator, make_reference
from simpletuner.helpers.data.mirroring import mirrored_sample
from simpletuner.helpers.data.planned import PlannedImage
from simpletuner.helpers.data.references import PlannedReference
from simpletuner.helpers.errors import DamagedImageError, DataError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor


def load_pixels(image: PlannedImage | PlannedReference, *, depth: DepthEstimator | None = None) -> Tensor:
    """Read a planned image as [3, H, W] float32 in [-1, 1], resized and cropped.

    Args:
        image: The image, or a reference.
        depth: Estimates depth; None if no reference needs it.

    Raises:
        DamagedImageError: Its pixels are damaged.
        DataError: The file changed or vanished since the scan.
        TrainingError: The pixels do not fit into memory.
        ModelError: A model for depth estimation cannot be loaded.
    """
    return as_pixels(planned_cut(load_image(image), image, depth=depth))


def load_image(image: PlannedImage | PlannedReference) -> Image.Image:
    """Read the whole file of a planned image as 8-bit sRGB.

    Raises:
        DamagedImageError: Its pixels are damaged.
        DataError: The file changed or vanished since the scan.
        TrainingError: The pixels do not fit into memory.
    """
    data = read_unchanged(image.file, image.digest)
    try:
        return decode_image(data)
    except DataError as error:
        raise DamagedImageError(str(error)) from error
    except MemoryError as error:
        raise TrainingError(
            f"{image.file.place}: {image.sample.original_px} px do not fit into memory. "
            "Free memory or scale the image down."
        ) from error


def planned_cut(
    whole: Image.Image, image: PlannedImage | PlannedReference, *, depth: DepthEstimator | None = None
) -> Image.Image:
    """The whole image, resized and cropped as planned; what is made of it, for a reference that is made.

    Args:
        whole: The image of `load_image`.
        image: The image, or a reference.
        depth: Estimates depth; None if no reference needs it.

    Raises:
        ModelError: A model for depth estimation cannot be loaded.
    """
    sample = image.sample
    plain = mirrored_sample(sample) if sample.is_mirrored else sample
    found = cut(whole, sample.resized_px, top_left=plain.crop_top_left, target_px=sample.target_px)
    if isinstance(image, PlannedReference) and image.making is not None:
        found = make_reference(found, image.making, seed=image.seed, depth=depth)
    return ImageOps.mirror(found) if sample.is_mirrored else found

"""The image that sampling starts from, and the mask of the part that it repaints."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from PIL import Image

from simpletuner.helpers.contracts import PipelineType, Size
from simpletuner.helpers.data.buckets import place
from simpletuner.helpers.data.images import cut, decode_image, decode_values
from simpletuner.helpers.errors import ConfigError, DataError
from simpletuner.helpers.sampling.references import own_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from simpletuner.helpers.models.family import ModelFamily


@dataclass(frozen=True, slots=True)
class StartOptions:
    """The arguments that name an image to start from."""

    image: Path
    mask: Path | None = None
    """White where the image is repainted."""
    denoising_strength: float = 0.6
    """Share of the denoising steps that run: 1 keeps nothing of the image."""


@dataclass(frozen=True, slots=True)
class StartImage:
    """An image to start from, decoded."""

    image: Image.Image
    mask: Image.Image | None
    denoising_strength: float

    @property
    def pipeline_type(self) -> PipelineType:
        """The pipeline that starts from it."""
        return "image2image" if self.mask is None else "inpaint"

    def size(self, resolution: int, *, alignment: int) -> Size:
        """The size with the image's aspect and the area of a square of this edge."""
        return own_size(self.image, Size(resolution, resolution), alignment=alignment)

    def inputs(self, size: Size) -> dict[str, Any]:
        """Keyword arguments of a pipeline's call: the image and its mask, resized and cut at the middle."""
        inputs: dict[str, Any] = {"image": _cut(self.image, size), "strength": self.denoising_strength}
        return inputs if self.mask is None else {**inputs, "mask_image": _cut(self.mask, size)}


def read_start(options: StartOptions, *, steps: int) -> StartImage:
    """Read the files.

    Args:
        options: Their names.
        steps: The smallest number of denoising steps.

    Raises:
        ConfigError: The strength leaves no step, or is no share.
        DataError: A file cannot be read, is no image, or the mask has another size.
    """
    strength = options.denoising_strength
    if not 0 < strength <= 1:
        raise ConfigError(
            f"--denoising-strength {strength:g}: must be above 0 and at most 1, which keeps nothing of the "
            "image."
        )
    if strength * steps < 1:
        raise ConfigError(
            f"--denoising-strength {strength:g} of {steps} steps is less than one step. Raise one of the two."
        )
    image, mask = _decoded(options.image, decode_image), None
    if options.mask is not None:
        mask = _decoded(options.mask, decode_values).convert("RGB").convert("L")
        if mask.size != image.size:
            found, wanted = (f"{each.width}x{each.height}" for each in (mask, image))
            raise DataError(
                f"{options.mask}: the mask has {found} pixels, {options.image} has {wanted}. Give a mask "
                "of the image's size, white where it is repainted."
            )
    return StartImage(image, mask, strength)


def check_pipeline(family: ModelFamily, start: StartImage) -> None:
    """Check, before its weights are loaded, that a family has a pipeline that starts from an image.

    Raises:
        ConfigError: It has none.
    """

    def has(pipeline_type: PipelineType) -> bool:
        found = family.pipelines.get(pipeline_type)
        return found is not None and "strength" in arguments_of(found)

    if has(start.pipeline_type):
        return
    model = f"diffusers has no pipeline of this {family.spec.name} model that"
    if start.mask is not None:
        raise ConfigError(f"--mask: {model} repaints a part of an image. Remove --image and --mask.")
    instead = "Give --mask too, white where it repaints." if has("inpaint") else "Remove --image."
    raise ConfigError(f"--image: {model} starts from an image. {instead}")


def arguments_of(pipeline_class: type[Any]) -> frozenset[str]:
    """Names of the arguments of a pipeline's call."""
    return frozenset(inspect.signature(pipeline_class.__call__).parameters)


def _decoded(file: Path, decode: Callable[[bytes], Image.Image]) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot read this image: {error.strerror}.") from error
    except DataError as error:
        raise DataError(f"{file}: not usable as an image: {error}. Give another file.") from error


def _cut(image: Image.Image, size: Size) -> Image.Image:
    placed = place(Size(image.height, image.width), size, style="center", rng=Random(0))
    return cut(image, placed.resized_px, top_left=placed.top_left, target_px=size)

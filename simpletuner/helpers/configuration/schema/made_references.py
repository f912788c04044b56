"""References that are made of the images of a dataset themselves, by its key `conditioning`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from simpletuner.helpers.configuration.schema.base import (
    Count,
    InputFolder,
    NonNegativeNumber,
    PositiveShare,
    Section,
    Share,
    contradiction,
    none_word,
)
from simpletuner.helpers.configuration.schema.captions import ReferenceCaptions
from simpletuner.helpers.configuration.schema.values import is_off

Quality = Annotated[int, Field(ge=1, le=100)]
MaskShape = Literal["rectangle", "circle", "brush", "irregular"]
_MAKING = {"type", "conditioning_type", "captions"}
"""Keys that do not say how a reference is made, but for the type."""


class MadeReference(Section):
    """Keys of every made reference."""

    type: str
    conditioning_type: Literal["reference_strict"] = "reference_strict"
    """reference_strict: it has the cut of its image."""
    captions: ReferenceCaptions = ()
    """As in an entry of references."""

    @property
    def is_random(self) -> bool:
        """Whether the seed changes it."""
        return False

    def recipe(self) -> str:
        """What its pixels depend on, beside those of its image and the seed."""
        return f"{self.type} {self.model_dump_json(exclude=_MAKING)}"


class Canny(MadeReference):
    """White edges on black, by Canny's method on the grey image."""

    type: Literal["canny"]
    """canny, or edges."""
    low_threshold: NonNegativeNumber = 50.0
    """A point counts as an edge above this, if it is joined to one above high_threshold; of the sum of the
    two Sobel gradients of 8-bit values."""
    high_threshold: NonNegativeNumber = 100.0
    """A point counts as an edge above this."""

    @model_validator(mode="after")
    def _thresholds_ascend(self) -> Self:
        if self.high_threshold < self.low_threshold:
            text = f"{self.high_threshold:g} is below low_threshold {self.low_threshold:g}. Raise it."
            raise contradiction("high_threshold", text, "low_threshold")
        return self


class Superresolution(MadeReference):
    """The image with less detail: made smaller and larger again, blurred, with noise, as a JPEG."""

    type: Literal["superresolution"]
    """superresolution, super_resolution or lowres."""
    downscale_factor: Annotated[float, Field(ge=1)] = 1.0
    """The image is made smaller by this factor and enlarged again; 1 leaves it."""
    blur_radius: NonNegativeNumber = 2.0
    """Radius of the blur, in pixels of the cut image; 0 for none."""
    blur_type: Literal["gaussian", "box", "both"] = "gaussian"
    """Kind of the blur; both has box, then gaussian, of 0.7 times the radius."""
    add_noise: bool = True
    """Add Gaussian noise."""
    noise_level: Share = 0.02
    """Standard deviation of the noise, where black is 0 and white 1."""
    jpeg_quality: Annotated[Quality | None, BeforeValidator(none_word)] = None
    """Quality of a JPEG as which it is stored last; null for none."""

    @property
    def is_random(self) -> bool:
        """Whether it has noise."""
        return self.add_noise and self.noise_level > 0


class JpegArtifacts(MadeReference):
    """The image after it was stored as a JPEG of low quality."""

    type: Literal["jpeg_artifacts"]
    """jpeg_artifacts, jpeg or compression."""
    quality_mode: Literal["fixed", "range", "random"] = "fixed"
    """Quality of an image: fixed, `quality`; range, drawn from quality_range; random, drawn from
    quality_list."""
    quality: Quality = 25
    """Of quality_mode fixed."""
    quality_range: tuple[Quality, Quality] = (10, 50)
    """Least and largest of quality_mode range."""
    quality_list: Annotated[tuple[Quality, ...], Field(min_length=1)] = (10, 20, 30, 40)
    """Of quality_mode random."""
    compression_rounds: Count = 1
    """How often the image is stored."""
    round_quality_decay: PositiveShare = 0.9
    """Factor of the quality from one time to the next."""

    @property
    def is_random(self) -> bool:
        """Whether the quality is drawn."""
        return self.quality_mode != "fixed"

    @model_validator(mode="after")
    def _range_ascends(self) -> Self:
        least, largest = self.quality_range
        if least > largest:
            raise contradiction("quality_range", f"{least} is above {largest}. Exchange them.")
        return self


class RandomMasks(MadeReference):
    """White shapes on black, drawn for each image, or the image with white shapes; no masks of the loss."""

    type: Literal["random_masks"]
    """random_masks, masks or inpainting."""
    mask_types: Annotated[tuple[MaskShape, ...], Field(min_length=1)] = (
        "rectangle",
        "circle",
        "brush",
        "irregular",
    )
    """Shapes to draw from."""
    min_coverage: Share = 0.1
    """Least part of the image that shapes cover; drawn between this and max_coverage."""
    max_coverage: Share = 0.5
    """Largest part that they cover."""
    output_mode: Literal["mask", "masked_image"] = "mask"
    """mask, white shapes on black; masked_image, the image with white shapes on it."""
    invert_mask: bool = False
    """Exchange what shapes cover and what they leave."""

    @property
    def is_random(self) -> bool:
        """Always."""
        return True

    @model_validator(mode="after")
    def _coverage_ascends(self) -> Self:
        if self.max_coverage < self.min_coverage:
            text = f"{self.max_coverage:g} is below min_coverage {self.min_coverage:g}. Raise it."
            raise contradiction("max_coverage", text, "min_coverage")
        return self


class Depth(MadeReference):
    """The depth that a model estimates: its least value black, its largest white."""

    type: Literal["depth"]
    """depth, depth_map or depth_midas."""
    model: InputFolder
    """Folder of a model for depth estimation, in the layout of transformers with .safetensors weights. It
    runs on the CPU, and nothing is downloaded."""

    def recipe(self) -> str:
        """Without the model's folder: what counts is what it holds."""
        return self.type


MADE_REFERENCES: tuple[type[MadeReference], ...] = (
    Canny,
    Superresolution,
    JpegArtifacts,
    RandomMasks,
    Depth,
)
_KINDS = {get_args(each.model_fields["type"].annotation)[0]: each for each in MADE_REFERENCES}
_ALIASES = {
    "edges": "canny",
    "super_resolution": "superresolution",
    "lowres": "superresolution",
    "jpeg": "jpeg_artifacts",
    "compression": "jpeg_artifacts",
    "masks": "random_masks",
    "inpainting": "random_masks",
    "depth_map": "depth",
    "depth_midas": "depth",
}


def _listed(value: object) -> object:
    """A list of objects, each with the name of its type here and its params beside its other keys.

    Raises:
        ValueError: An entry is no object, or its type is none.
    """
    if is_off(value):
        return ()
    entries = value if isinstance(value, list | tuple) else [value]
    return [each if isinstance(each, MadeReference) else _named(each) for each in entries]


def _named(entry: object) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError('must be objects, for instance [{"type": "canny"}].')
    given = {**entry, **(entry["params"] if isinstance(entry.get("params"), Mapping) else {})}
    given = {key: each for key, each in given.items() if key != "params" and each is not None}
    kind = _ALIASES.get(str(given.get("type")), given.get("type"))
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ValueError(f"type {given.get('type')!r}: must be one of {known}. Other kinds need an entry.")
    fields = _KINDS[str(kind)].model_fields
    return {key: each for key, each in given.items() if key in fields or not is_off(each)} | {"type": kind}


AnyMadeReference = Annotated[
    Canny | Superresolution | JpegArtifacts | RandomMasks | Depth, Field(discriminator="type")
]
MadeReferences = Annotated[tuple[AnyMadeReference, ...], BeforeValidator(_listed)]

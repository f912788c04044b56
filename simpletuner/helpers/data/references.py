"""Reference images: how each is cut, and which of them a sample is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.made_references import MadeReference
from simpletuner.helpers.configuration.schema.references import CROP_KEYS, ReferenceConfig
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.buckets import Placement
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.data.index import ImageInfo
from simpletuner.helpers.data.pairing import Pair
from simpletuner.helpers.data.sources.base import FoundFile
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.randomness import mix

# Raise it when making gives other pixels than before.
_MAKING_VERSION = "made 1"


@dataclass(frozen=True, slots=True)
class PlannedReference:
    """A reference of a usable image."""

    entry: str
    """id of the entry that it comes from, or the type of one that is made."""
    file: FoundFile
    digest: str
    """Of the file's bytes."""
    content: str
    """Identity of its pixels, for the keys of cached latents."""
    sample: Sample
    """Its own name, size and cut."""
    captions: tuple[str, ...] = ()
    """Stand for the image's own where it is trained with this reference; empty for none."""
    problem: str | None = None
    """The reason if its pixels were found damaged in an earlier run."""
    making: MadeReference | None = None
    """How it is made of its image; None if it has a file of its own."""
    seed: int = 0
    """Of making it."""


def planned_reference(
    pair: Pair, entry: ReferenceConfig, *, dataset: DatasetConfig, placement: Placement, cropping: Cropping
) -> PlannedReference | str:
    """The reference of an image with its cut, or the reason why it cannot be cut.

    Args:
        pair: The file.
        entry: That it comes from.
        dataset: Of the image.
        placement: The image's resize and crop.
        cropping: Of the dataset.
    """
    name = printable(pair.file.name)
    if entry.conditioning_type == "reference_loose":
        own = replace(cropping, config=loose_config(dataset, entry)).placement(pair.size, name=pair.file.name)
        if isinstance(own, str):
            return f"its reference {name} cannot be used: {own}"
        placement = own
    return PlannedReference(
        entry=entry.id,
        file=pair.file,
        digest=pair.info.digest,
        content=pair.info.content,
        sample=_sample(dataset.id, pair.file, size=pair.size, placement=placement),
        captions=entry.captions,
        problem=pair.info.problem,
    )


def made_reference(
    image: FoundFile,
    info: ImageInfo,
    making: MadeReference,
    *,
    dataset: DatasetConfig,
    placement: Placement,
    cropping: Cropping,
) -> PlannedReference:
    """The reference that is made of the cut of an image.

    Args:
        image: The file.
        info: Of the file.
        making: How it is made.
        dataset: Of the image.
        placement: The image's resize and crop.
        cropping: Of the dataset.
    """
    assert info.size is not None, "the image is usable"
    seed = mix(cropping.seed, f"made {making.type}", dataset.id, image.name) if making.is_random else 0
    return PlannedReference(
        entry=making.type,
        file=image,
        digest=info.digest,
        content=f"{info.content} {_MAKING_VERSION} {making.recipe()} {seed}",
        sample=_sample(dataset.id, image, size=info.size, placement=placement),
        captions=making.captions,
        making=making,
        seed=seed,
    )


def _sample(dataset_id: str, file: FoundFile, *, size: Size, placement: Placement) -> Sample:
    return Sample(
        dataset_id=dataset_id,
        path=printable(file.name),
        caption="",
        original_px=size,
        resized_px=placement.resized_px,
        crop_top_left=placement.top_left,
        target_px=placement.target_px,
    )


def loose_config(dataset: DatasetConfig, entry: ReferenceConfig) -> DatasetConfig:
    """The settings by which references are cut by themselves: the dataset's resolution, the entry's crop."""
    crop = {key: getattr(entry, key) for key in CROP_KEYS}
    unlimited = {
        "minimum_image_size": 0.0,
        "maximum_image_size": None,
        "target_downsample_size": None,
        "max_upscale_threshold": None,
    }
    return dataset.model_copy(update={"id": entry.id, **crop, **unlimited})


def bucket_name(target_px: Size, references_px: Sequence[Size]) -> str:
    """The bucket of an image by its size, and by those of its references if one of them differs."""
    sizes = (target_px, *references_px)
    return str(target_px) if len(set(sizes)) == 1 else " + ".join(map(str, sizes))


def reference_fact(image: str, reference: PlannedReference, *, content: str) -> str:
    """What a resumed run compares of a reference of an image, by its name; `content` is the pixels'."""
    cut = reference.sample
    return (
        f"{image} {reference.entry} {content} {cut.resized_px} {cut.crop_top_left} {cut.target_px} "
        f"{reference.captions}"
    )


def drawn_references(
    image: Sample, references: Sequence[PlannedReference], *, seed: int, epoch: int, bucket: str
) -> tuple[PlannedReference, ...]:
    """The one of several references that an image is trained with in an epoch.

    A batch holds references of one size. So if the sizes of an image's references differ, those of its whole
    bucket, in which they differ in the same way, come from one entry.
    """
    if len(references) < 2:
        return tuple(references)
    sizes = {each.sample.target_px for each in references}
    drawn_for = (image.dataset_id, image.path) if len(sizes) == 1 else (bucket,)
    return (references[mix(seed, "reference", *drawn_for, epoch) % len(references)],)

"""The usable images of a dataset, as columns; an object for an image is made when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.caption_variants import CaptionPlan
from simpletuner.helpers.data.columns import Lazy, Rows, Texts
from simpletuner.helpers.data.index import content_of, rows_of
from simpletuner.helpers.data.masks import MaskKind
from simpletuner.helpers.data.references import PlannedReference, bucket_name
from simpletuner.helpers.data.sources.base import Files, FoundFile, SkippedImage
from simpletuner.helpers.io.names import printable

Variants = tuple[tuple[str, ...], ...]
"""The variants of each caption of an image."""


@dataclass(frozen=True, slots=True)
class PlannedMask:
    """The mask of a usable image."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    kind: MaskKind
    key: str
    """Of its entry in the cache of latents."""


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A usable image."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    sample: Sample
    """With the first variant of the first caption."""
    captions: tuple[tuple[str, ...], ...]
    """The variants of each caption; each draw of the image takes one of one."""
    content: str
    """Identity of its pixels, for the keys of cached latents."""
    mask: PlannedMask | None = None
    references: tuple[PlannedReference, ...] = ()
    """One of each entry of references, in the order of conditioning_data, then those that are made."""

    @property
    def bucket(self) -> str:
        """The bucket within its dataset."""
        return bucket_name(self.sample.target_px, [each.sample.target_px for each in self.references])

    def fault(self, damaged: Mapping[str, str]) -> str | None:
        """The reason if it, its mask or a reference is damaged; by digests, and keys of masks."""
        ids = [self.digest, *(each.digest for each in self.references)]
        ids += [] if self.mask is None else [self.mask.digest, self.mask.key]
        return next((damaged[each] for each in ids if each in damaged), None)


@dataclass(frozen=True, slots=True)
class CaptionTexts:
    """The captions of images, most of which have one with one variant."""

    ones: Texts
    """The first variant of the first caption of each image."""
    several: Mapping[int, Variants] = field(default_factory=dict)
    """Position -> the captions of an image that has more."""

    def of(self, row: int) -> Variants:
        """The captions of one image."""
        return self.several.get(row) or ((self.ones[row],),)

    def all(self) -> Iterator[str]:
        """Every variant of every caption, in the order of the images."""
        if not self.several:
            return iter(self.ones)
        return (
            text
            for row, first in enumerate(self.ones)
            for variants in self.several.get(row, ((first,),))
            for text in variants
        )

    def take(self, rows: Rows) -> CaptionTexts:
        """The captions of the images at some positions."""
        several = {new: self.several[row] for new, row in enumerate(rows.tolist()) if row in self.several}
        return CaptionTexts(self.ones.take(rows), several if self.several else {})


@dataclass(frozen=True, eq=False)
class PlannedImages(Sequence[PlannedImage]):
    """The usable images of a dataset."""

    dataset_id: str
    files: Files
    digests: npt.NDArray[np.uint8]
    """[n, 16], of the files' bytes."""
    is_read_anew: npt.NDArray[np.bool_]
    """Whether earlier versions read other pixels from each."""
    cuts: npt.NDArray[np.int32]
    """[n, 8]: height and width of the image and of its resized size, top and left, height and width of the
    crop."""
    captions: CaptionTexts
    masks: Sequence[PlannedMask | None] | None = None
    """One for each image; None without masks."""
    references: Sequence[tuple[PlannedReference, ...]] | None = None
    """Those of each image; None without references."""

    @property
    def samples(self) -> Lazy[Sample]:
        """The sample of each image."""
        return Lazy(len(self), self.sample)

    def sample(self, row: int) -> Sample:
        """The sample of one image."""
        height, width, resized_height, resized_width, top, left, target_height, target_width = self.cuts[
            row
        ].tolist()
        return Sample(
            dataset_id=self.dataset_id,
            path=printable(self.files.names[row]),
            caption=self.captions.ones[row],
            original_px=Size(height, width),
            resized_px=Size(resized_height, resized_width),
            crop_top_left=(top, left),
            target_px=Size(target_height, target_width),
        )

    def all_references(self) -> list[PlannedReference]:
        """The references of all images, in their order."""
        return [each for own in self.references or () for each in own]

    def take(self, rows: Rows) -> PlannedImages:
        """The images at some positions."""
        return PlannedImages(
            self.dataset_id,
            self.files.take(rows),
            self.digests[rows],
            self.is_read_anew[rows],
            self.cuts[rows],
            self.captions.take(rows),
            None if self.masks is None else [self.masks[row] for row in rows.tolist()],
            None if self.references is None else [self.references[row] for row in rows.tolist()],
        )

    def members(self) -> dict[tuple[Size, str], Rows]:
        """Size and bucket -> the positions of its images, by size and then in the order of the images."""
        targets, of_target = np.unique(self.cuts[:, 6:8], axis=0, return_inverse=True)
        members: dict[tuple[Size, str], Rows] = {}
        for number, (height, width) in enumerate(targets.tolist()):
            target_px, rows = Size(height, width), np.flatnonzero(of_target.reshape(-1) == number)
            if self.references is None:
                members[target_px, str(target_px)] = rows
                continue
            names: dict[str, list[int]] = {}
            for row in rows.tolist():
                sizes = [each.sample.target_px for each in self.references[row]]
                names.setdefault(bucket_name(target_px, sizes), []).append(row)
            members |= {(target_px, name): np.array(rows) for name, rows in names.items()}
        return members

    def faults(self, damaged: Mapping[str, str]) -> dict[int, str]:
        """Position -> the reason, of the images that are damaged, or whose mask or a reference is."""
        if self.masks is None and self.references is None:
            rows = np.flatnonzero(rows_of(self.digests, damaged))
            return {row: damaged[self.digests[row].tobytes().hex()] for row in rows.tolist()}
        found = ((row, image.fault(damaged)) for row, image in enumerate(self))
        return {row: fault for row, fault in found if fault is not None}

    def __len__(self) -> int:
        return len(self.digests)

    @overload
    def __getitem__(self, index: int) -> PlannedImage: ...
    @overload
    def __getitem__(self, index: slice) -> list[PlannedImage]: ...
    def __getitem__(self, index: int | slice) -> PlannedImage | list[PlannedImage]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        digest = self.digests[row].tobytes().hex()
        return PlannedImage(
            file=self.files[row],
            digest=digest,
            sample=self.sample(row),
            captions=self.captions.of(row),
            content=content_of(digest, is_read_anew=bool(self.is_read_anew[row])),
            mask=None if self.masks is None else self.masks[row],
            references=() if self.references is None else self.references[row],
        )


@dataclass(frozen=True, slots=True)
class Members:
    """Some of a dataset's images."""

    images: PlannedImages
    """Of the dataset."""
    rows: Rows
    """The positions of these."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PlannedImage:
        return self.images[int(self.rows[index])]

    def __iter__(self) -> Iterator[PlannedImage]:
        return map(self.images.__getitem__, self.rows.tolist())


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """The images of one dataset."""

    config: DatasetConfig
    caption_plan: CaptionPlan
    images: PlannedImages
    """In the order of their names; never empty."""
    skipped: tuple[SkippedImage, ...]

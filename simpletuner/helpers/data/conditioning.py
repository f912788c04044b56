"""What conditions an image: its mask and its references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.data.buckets import Placement
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.data.index import ImageIndex, ImageInfo
from simpletuner.helpers.data.masks import FoundMask
from simpletuner.helpers.data.pairing import Pair, PairFinder
from simpletuner.helpers.data.references import PlannedReference, made_reference, planned_reference
from simpletuner.helpers.data.sources.base import FoundFile

Entry = ConditioningConfig | ReferenceConfig
_WHITE = "; a white mask keeps the whole image"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What conditions a usable image."""

    mask: FoundMask | None = None
    references: tuple[PlannedReference, ...] = ()

    @property
    def problem(self) -> str | None:
        """The reason if an earlier run found the pixels of one of them damaged."""
        problems = [each.problem for each in self.references]
        problems += [self.mask.problem] if self.mask is not None else []
        return next(filter(None, problems), None)


class ConditioningFinder:
    """Finds what conditions a dataset's images; notes what is missing, ambiguous or of another shape."""

    def __init__(
        self, dataset: DatasetConfig, entries: Sequence[Entry], *, index_of: Callable[[Entry], ImageIndex]
    ) -> None:
        self._dataset = dataset
        self._masks = [
            PairFinder(each, index_of(each), noun="mask", keeps_aspect=True, remedy=_WHITE)
            for each in entries
            if isinstance(each, ConditioningConfig)
        ]
        self._references = [
            (each, PairFinder(each, index_of(each), noun="reference", keeps_aspect=is_strict(each)))
            for each in entries
            if isinstance(each, ReferenceConfig)
        ]

    @property
    def finds(self) -> bool:
        """Whether anything conditions the images."""
        dataset = self._dataset
        return bool(self._masks or self._references or dataset.alpha_mask or dataset.conditioning)

    def conditioning_of(
        self, image: FoundFile, info: ImageInfo, *, placement: Placement, cropping: Cropping
    ) -> Conditioning | str:
        """What conditions a usable image, or the reason why the image cannot be used.

        Args:
            image: The file.
            info: Of the file.
            placement: Its resize and crop.
            cropping: Of its dataset.
        """
        assert info.size is not None, "the image is usable"
        mask = FoundMask(image, info.digest, "alpha") if self._dataset.alpha_mask else None
        for pairs in self._masks:
            pair = pairs.pair_of(image, info.size)
            if isinstance(pair, str):
                return pair
            mask = _mask(pair, pairs.entry)
        references: list[PlannedReference] = []
        for entry, pairs in self._references:
            found: Pair | PlannedReference | str = pairs.pair_of(image, info.size)
            if isinstance(found, Pair):
                found = planned_reference(
                    found, entry, dataset=self._dataset, placement=placement, cropping=cropping
                )
            if isinstance(found, str):
                return found
            assert isinstance(found, PlannedReference), "a pair was planned"
            references.append(found)
        references += [
            made_reference(image, info, each, dataset=self._dataset, placement=placement, cropping=cropping)
            for each in self._dataset.conditioning
        ]
        return Conditioning(mask, tuple(references))

    def problem(self) -> str | None:
        """Why what was found so far cannot be used; None if it can."""
        finders = [*self._masks, *(pairs for _, pairs in self._references)]
        lines = [line for pairs in finders for line in pairs.problems()]
        return f"Dataset {self._dataset.id!r}: {'. '.join(lines)}." if lines else None


def entries_of(dataset: DatasetConfig, entries: Sequence[Entry]) -> list[Entry]:
    """The entries that condition a dataset, in the order in which it names them."""
    known = {each.id: each for each in entries}
    return [known[identity] for identity in dataset.conditioning_data]


def is_strict(entry: ReferenceConfig) -> bool:
    """Whether references get the cut of their images."""
    return entry.conditioning_type == "reference_strict"


def _mask(pair: Pair, entry: Entry) -> FoundMask:
    assert isinstance(entry, ConditioningConfig), "an entry of masks"
    return FoundMask(pair.file, pair.info.digest, entry.conditioning_type, pair.info.problem)

"""What the caches are asked for: latents of images and references, masks, and embeddings of captions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial

import numpy as np
from torch import Tensor

from simpletuner.helpers.caching.filling import MASK, TEXT_ENCODER, VAE, CacheRequest, CacheRequests
from simpletuner.helpers.caching.memory import MemoryStore
from simpletuner.helpers.caching.shards import halves
from simpletuner.helpers.configuration.schema.masks import MaskConfig
from simpletuner.helpers.data.cache_reader import CacheReader
from simpletuner.helpers.data.held_out import Divided
from simpletuner.helpers.data.index import read_unchanged
from simpletuner.helpers.data.made_references import DepthEstimator
from simpletuner.helpers.data.masks import BLANK, is_blank, read_mask
from simpletuner.helpers.data.mirroring import mirrored
from simpletuner.helpers.data.pixels import load_pixels
from simpletuner.helpers.data.planned import Members, PlannedImage, PlannedMask
from simpletuner.helpers.data.references import PlannedReference
from simpletuner.helpers.data.scan_report import beginning, shown
from simpletuner.helpers.errors import DamagedImageError, DataError
from simpletuner.helpers.io.names import printable


@dataclass(frozen=True)
class DataRequests:
    """Makes the requests for the cache entries of images; their inputs are read when they are needed."""

    cached: CacheReader
    _: KW_ONLY
    masks: MaskConfig
    depth: DepthEstimator | None
    damaged: dict[str, str]
    """Takes what turns out to be damaged while it is read: digest or key of a mask -> reason."""

    def latents(
        self, buckets: Sequence[tuple[str, Members]], divided: Divided, *, flipped: Collection[str]
    ) -> CacheRequests[Tensor]:
        """A request for the latents of each image, by bucket, the held-out ones last; then of each reference.

        Inputs are [3, H, W] in [-1, 1]. Images whose latents are not cached have none.

        Args:
            buckets: Name and images of each bucket.
            divided: The images of the run.
            flipped: ids of the datasets whose images are also trained mirrored.
        """
        buckets = [each for each in buckets if self.is_kept(each[1].images.dataset_id)]
        singles: list[tuple[PlannedImage | PlannedReference, str, str]] = [
            (mirrored(image), image.sample.path, name)
            for name, own in buckets
            if own.images.dataset_id in flipped
            for image in own
        ]
        held_out = sorted(divided.held_out, key=bucket_of)
        singles += [(image, image.sample.path, bucket_of(image)) for image in held_out]
        turned = [
            mirrored(each)
            for plan in divided.trained
            if plan.config.id in flipped
            for each in plan.images.all_references()
        ]
        references = sorted(
            (*divided.references(), *turned),
            key=lambda each: (each.sample.dataset_id, each.sample.target_px),
        )
        for each in references:
            group = f"references {each.sample.dataset_id} {each.sample.target_px}"
            singles.append((each, f"Reference {each.sample.path} of {each.entry}", group))
        singles = [each for each in singles if self.is_kept(each[0].sample.dataset_id)]
        members = [each for _, each in buckets]
        ends = np.cumsum([0, *map(len, members)])

        def make(row: int) -> CacheRequest[Tensor]:
            if row >= ends[-1]:
                image, name, group = singles[row - int(ends[-1])]
                return self.of_image(image, name=name, batch_group=group)
            number = int(np.searchsorted(ends, row, side="right")) - 1
            own = members[number][row - int(ends[number])]
            return self.of_image(own, name=own.sample.path, batch_group=buckets[number][0])

        stores = list(self.cached.latents_stores.values())
        number_of = {dataset: number for number, dataset in enumerate(self.cached.latents_stores)}
        keys = [self.cached.latents_keys(each.images, each.rows) for each in members]
        keys.append(halves([self.cached.latents_key(each) for each, _, _ in singles]))
        store_rows = [np.full(len(each), number_of[each.images.dataset_id], np.int64) for each in members]
        store_rows.append(np.array([number_of[each.sample.dataset_id] for each, _, _ in singles], np.int64))
        return CacheRequests(stores, np.concatenate(store_rows), np.concatenate(keys), make=make)

    def of_image(
        self, image: PlannedImage | PlannedReference, *, name: str, batch_group: str
    ) -> CacheRequest[Tensor]:
        """A request for the latents of an image or a reference."""
        return CacheRequest(
            store=self.cached.latents_stores[image.sample.dataset_id],
            key=self.cached.latents_key(image),
            name=name,
            encoder=VAE,
            metadata={"image": image.sample.path, "size": str(image.sample.target_px)},
            load=partial(self._pixels_unless_damaged, image),
            batch_group=batch_group,
            file=image.file,
        )

    def of_masks(self, divided: Divided) -> list[CacheRequest[Tensor]]:
        """A request for each mask in its image's crop, of what is cached; inputs are those of `read_mask`."""
        return [
            self.of_mask(image, image.mask)
            for images in divided.parts
            if images.masks is not None and self.is_kept(images.dataset_id)
            for image in images
            if image.mask is not None
        ]

    def of_mask(self, image: PlannedImage, mask: PlannedMask) -> CacheRequest[Tensor]:
        """A request for the mask of an image."""
        return CacheRequest(
            store=self.cached.latents_stores[image.sample.dataset_id],
            key=mask.key,
            name=f"Mask of {image.sample.path}",
            encoder=MASK,
            metadata={"image": image.sample.path, "mask": printable(mask.file.name)},
            load=partial(self._mask_unless_damaged, image, mask),
            file=mask.file,
        )

    def is_kept(self, dataset_id: str) -> bool:
        """Whether latents and masks of a dataset are cached for later batches and runs."""
        return not isinstance(self.cached.latents_stores[dataset_id], MemoryStore)

    def texts(self, texts: Sequence[str], *, vital: Collection[str]) -> CacheRequests[str]:
        """A request for the embeddings of each text; those of vital ones are read at once."""
        return CacheRequests(
            [self.cached.text_store],
            np.zeros(len(texts), np.int64),
            self.cached.text_keys(texts),
            make=lambda row: self.of_text(texts[row], is_vital=texts[row] in vital),
            read_at_once=[row for row, prompt in enumerate(texts) if prompt in vital],
        )

    def of_text(self, prompt: str, *, is_vital: bool = False) -> CacheRequest[str]:
        """A request for the embeddings of a text."""
        return CacheRequest(
            store=self.cached.text_store,
            key=self.cached.text_key(prompt),
            name=f"Prompt {shown(prompt)}",
            encoder=TEXT_ENCODER,
            metadata={"prompt": beginning(prompt)},
            load=partial(str, prompt),
            is_read_at_once=is_vital,
        )

    def _pixels_unless_damaged(self, image: PlannedImage | PlannedReference) -> Tensor | None:
        """The pixels of an image or a reference; None, and a note in `damaged`, if they are damaged."""
        try:
            return load_pixels(image, depth=self.depth)
        except DamagedImageError as error:
            is_file = isinstance(image, PlannedReference) and image.making is None
            start = f"its reference {image.sample.path} cannot be used: " if is_file else ""
            self.damaged.setdefault(image.digest, f"{start}{error}")
            return None

    def _mask_unless_damaged(self, image: PlannedImage, mask: PlannedMask) -> Tensor | None:
        """The mask of an image; None if it is damaged. A note in `damaged` if so, or if it is blank."""
        try:
            data = read_unchanged(mask.file, mask.digest)
        except DamagedImageError as error:
            self.damaged[mask.digest] = f"its mask {printable(mask.file.name)} cannot be used: {error}"
            return None
        try:
            values = read_mask(data, image.sample, kind=mask.kind)
        except DataError as error:
            self.damaged[mask.digest] = f"its mask {printable(mask.file.name)} cannot be used: {error}"
            return None
        if is_blank(values, mask.kind, self.masks):
            self.damaged[mask.key] = BLANK
            if not self.is_kept(image.sample.dataset_id):
                return None  # a mask that is cached leaves its image out before the first batch
        return values


def bucket_of(image: PlannedImage) -> str:
    """Name of an image's bucket among those of all datasets."""
    return f"{image.sample.dataset_id} {image.bucket}"

"""Reads what is cached of an image: latents, prompt embeds, mask and references.

Shapes: C latent channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simpletuner.helpers.caching.latents import latents_key, latents_key_texts, read_latents
from simpletuner.helpers.caching.masks import read_cached_mask
from simpletuner.helpers.caching.memory import EntryStore
from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.caching.recent import RecentlyRead
from simpletuner.helpers.caching.store import key_halves
from simpletuner.helpers.caching.text import read_text, text_key, text_key_texts
from simpletuner.helpers.configuration.schema.made_references import Depth
from simpletuner.helpers.configuration.schema.masks import MaskConfig
from simpletuner.helpers.contracts import Sample, TextEmbeds
from simpletuner.helpers.data.columns import Rows, in_pieces
from simpletuner.helpers.data.index import content_of
from simpletuner.helpers.data.made_references import DepthEstimator
from simpletuner.helpers.data.masks import loss_factors
from simpletuner.helpers.data.planned import PlannedImage, PlannedImages
from simpletuner.helpers.data.references import PlannedReference
from simpletuner.helpers.data.scan_report import shown
from simpletuner.helpers.errors import CacheEntryError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.randomness import mix

_WHOLE = 1 << 63  # above every value of `mix`


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedItem:
    """One image's part of a batch."""

    sample: Sample
    latents: Tensor
    """[C, h, w]."""
    text: TextEmbeds
    loss_mask: Tensor | None
    """[1, h, w] float32, factors of the loss; None without a mask."""
    references: tuple[Tensor, ...]
    """[C, h, w] of each reference."""


@dataclass(eq=False)
class CacheReader:
    """The cache entries of the images of a run."""

    text_store: EntryStore
    latents_stores: Mapping[str, EntryStore]
    """By the id of the dataset."""
    _: KW_ONLY
    seed: int
    masks: MaskConfig
    depth: DepthEstimator | None
    watch: LoaderWatch
    """It is told what is read."""
    caches_text: bool
    """Whether prompt embeds are read; else items have none."""
    text_memory_bytes: int
    _vae_identity: str = field(init=False, default="")
    _text_identity: str = field(init=False, default="")
    _texts: RecentlyRead[TextEmbeds] = field(init=False)

    def __post_init__(self) -> None:
        self._texts = RecentlyRead(self.text_memory_bytes)

    def set_encoders(self, *, vae_identity: str, text_identity: str) -> None:
        """Set the identities of the encoders, which are part of the cache keys."""
        self._vae_identity, self._text_identity = vae_identity, text_identity

    def item(
        self,
        image: PlannedImage,
        sample: Sample,
        *,
        references: Sequence[PlannedReference],
        sample_index: int,
    ) -> CachedItem:
        """An image's cached tensors, with the caption of its sample.

        Raises:
            CacheEntryError: One is missing or damaged.
        """
        latents = self._latents(image)
        return CachedItem(
            sample=sample,
            latents=latents,
            text=self._noted_text_embeds(sample.caption),
            loss_mask=self._loss_factors(image, sample_index, grid=(latents.shape[-2], latents.shape[-1])),
            references=tuple(map(self._latents, references)),
        )

    def text_embeds(self, prompt: str) -> TextEmbeds:
        """The cached embeddings of a prompt, with a batch axis of 1, on the CPU.

        Raises:
            CacheEntryError: They are not cached.
        """
        key = self.text_key(prompt)
        embeds = self._texts.get(key) or read_text(self.text_store, key)
        if embeds is None:
            raise CacheEntryError(
                f"The text cache in {printable(str(self.text_store.folder))} lacks the prompt "
                f"{shown(prompt)}. Start the run again: it first encodes missing entries."
            )
        self._texts.keep(key, embeds, num_bytes=sum(each.nbytes for each in embeds.tensors().values()))
        return embeds

    def latents_key(self, image: PlannedImage | PlannedReference) -> str:
        """The cache key of the latents of an image or a reference."""
        assert self._vae_identity, "the identities come first"
        return latents_key(image.sample, image_digest=self.content(image), vae_identity=self._vae_identity)

    def latents_keys(self, images: PlannedImages, rows: Rows) -> npt.NDArray[np.uint64]:
        """[n, 2], the halves of the cache keys of the latents of the images at some positions."""
        assert self._vae_identity, "the identities come first"
        digests = images.digests[rows].tobytes().hex()
        contents = (
            content_of(digests[start : start + 32], is_read_anew=anew)
            for start, anew in zip(
                range(0, len(digests), 32), images.is_read_anew[rows].tolist(), strict=True
            )
        )
        cuts = map(tuple, in_pieces(images.cuts[rows, 2:]))
        return key_halves(latents_key_texts(contents, cuts, vae_identity=self._vae_identity))

    def text_keys(self, prompts: Sequence[str]) -> npt.NDArray[np.uint64]:
        """[n, 2], the halves of the cache keys of the embeddings of prompts."""
        assert self._text_identity, "the identities come first"
        return key_halves(text_key_texts(prompts, text_identity=self._text_identity))

    def text_key(self, prompt: str) -> str:
        """The cache key of the embeddings of a prompt."""
        assert self._text_identity, "the identities come first"
        return text_key(prompt, text_identity=self._text_identity)

    def content(self, image: PlannedImage | PlannedReference) -> str:
        """Identity of the pixels of an image; of a reference of depth, that of the model too."""
        if isinstance(image, PlannedImage) or not isinstance(image.making, Depth):
            return image.content
        assert self.depth is not None, "a reference of depth needs an estimator"
        return f"{image.content} {self.depth.identity(image.making.model)}"

    def _latents(self, image: PlannedImage | PlannedReference) -> Tensor:
        store = self.latents_stores[image.sample.dataset_id]
        self.watch.note(
            f"the latents of {printable(image.sample.path)} (dataset {image.sample.dataset_id!r}) from "
            f"{printable(str(store.folder))}"
        )
        latents = read_latents(store, self.latents_key(image))
        if latents is None:
            raise CacheEntryError(
                f"The latents of {image.sample.path} (dataset {image.sample.dataset_id!r}) are not in "
                f"{printable(str(store.folder))}. Start the run again: it first encodes missing entries."
            )
        return latents

    def _noted_text_embeds(self, prompt: str) -> TextEmbeds:
        if not self.caches_text:
            return TextEmbeds(prompt_embeds=torch.empty(1, 0, 0))
        folder = printable(str(self.text_store.folder))
        self.watch.note(f"the embeddings of the prompt {shown(prompt)} from {folder}")
        return self.text_embeds(prompt)

    def _loss_factors(
        self, image: PlannedImage, sample_index: int, *, grid: tuple[int, int]
    ) -> Tensor | None:
        """The factors of the loss, [1, h, w] float32; None without a mask."""
        mask = image.mask
        if mask is None:
            return None
        share = mix(self.seed, "masked loss", sample_index) / _WHOLE
        if mask.kind == "segmentation" and share >= self.masks.masked_loss_probability:
            return torch.ones(1, *grid)
        store = self.latents_stores[image.sample.dataset_id]
        self.watch.note(f"the mask of {printable(image.sample.path)} from {printable(str(store.folder))}")
        values = read_cached_mask(store, mask.key)
        if values is None:
            raise CacheEntryError(
                f"The mask of {image.sample.path} (dataset {image.sample.dataset_id!r}) is not in "
                f"{printable(str(store.folder))}. Start the run again: it first reads missing masks."
            )
        factors = loss_factors(values, mask.kind, grid=grid, config=self.masks)
        return factors.flip(-1) if image.sample.is_mirrored else factors

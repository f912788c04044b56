"""Everything that the training loop asks about data.

Shapes: B batch, C latent channels, H W image height and width, h w latent height and width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.helpers.caching.latents import LatentRequest, fill_latents, read_latents
from simpletuner.helpers.caching.prefetch import prefetch
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.caching.text import TextCache
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Batch, Sample, TextEmbeds
from simpletuner.helpers.data.images import decode_image, resize_and_crop
from simpletuner.helpers.data.index import ImageIndex, content_digest
from simpletuner.helpers.data.planning import DatasetPlan, PlannedImage, PlanSettings, plan_dataset
from simpletuner.helpers.data.sampler import Bucket, Sampler
from simpletuner.helpers.data.sources import MAX_FILE_BYTES, Skipped, read_bounded
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import file_name, printable
from simpletuner.helpers.randomness import mix

logger = logging.getLogger(__name__)

# Part of every latent's key: raised when the way from bytes to pixels changes.
_PIXELS_VERSION = "pixels 1"
_MIX_RANGE = 1 << 63
_SHOWN = 5


def stack_text(texts: Sequence[TextEmbeds]) -> TextEmbeds:
    """One batch of embeddings that all have the same number of tokens: [B, L, D], [B, P] and [B, L]."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    masks = [text.attention_mask for text in texts if text.attention_mask is not None]
    return TextEmbeds(
        prompt_embeds=torch.cat([text.prompt_embeds for text in texts]),
        pooled=torch.cat(pooled) if pooled else None,
        attention_mask=torch.cat(masks) if masks else None,
    )


@dataclass(eq=False)
class TrainingData:
    """The images and captions of all datasets, their caches, and the endless sequence of batches.

    Making one scans the folders and decides what is trained on and in which order; it needs no model.
    The order depends on the seed, the data and the global batch (batch_size times num_processes) alone, so
    runs on other numbers of processes with the same global batch see the same global batches.

    Raises:
        DataError: A dataset has no usable image, a caption cannot be used, or a cache lies in a data folder.
    """

    datasets: Sequence[DatasetConfig]
    data: DataConfig
    _: KW_ONLY
    seed: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    pixel_alignment: int
    """Width and height of what is encoded are multiples of this, unless the configuration says otherwise."""
    caption_dropout: float = 0.0
    """Share of draws that train without a caption."""
    stack_text: Callable[[Sequence[TextEmbeds]], TextEmbeds] = stack_text

    samples: tuple[Sample, ...] = field(init=False)
    """Every image that is trained on, once, with its first caption."""
    skipped: tuple[Skipped, ...] = field(init=False)
    """Every image that is not, with the reason."""
    batches_per_epoch: int = field(init=False)
    """Micro-batches of each process in one epoch."""

    def __post_init__(self) -> None:
        active = [each for each in self.datasets if each.dataset_type == "image" and not each.disabled]
        settings = PlanSettings(
            seed=self.seed,
            alignment=self.data.alignment(self.pixel_alignment),
            aspect_decimals=self.data.aspect_bucket_rounding,
        )
        self._text_folder = _outside_the_data(self.data.cache_dir_text, self.datasets)
        plans = [_planned(each, settings, cache=self._latents_folder(each)) for each in active]
        self._stores = {each.id: TensorStore(self._latents_folder(each)) for each in active}
        self._buckets = [bucket for plan in plans for bucket in _buckets_of(plan)]
        self._sampler = Sampler(
            [bucket for bucket, _ in self._buckets],
            seed=self.seed,
            batch_size=self.batch_size * self.num_processes,
        )
        self._latents_identity: str | None = None
        self._texts: TextCache | None = None
        self._images = [image for plan in plans for image in plan.images]
        self.samples = tuple(image.sample for image in self._images)
        self.skipped = tuple(each for plan in plans for each in plan.skipped)
        self.batches_per_epoch = self._sampler.batches_per_epoch
        self._report()

    def captions(self) -> tuple[str, ...]:
        """Every caption that can be drawn, once, in the order of the images; "" first when dropout is on."""
        texts = [text for image in self._images for text in image.captions]
        return tuple(dict.fromkeys(["", *texts] if self.caption_dropout > 0 else texts))

    def cache_latents(
        self,
        encode: Callable[[Tensor], Tensor],
        *,
        identity: str,
        batch_size: int,
        on_progress: Callable[[int, int], None] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> int:
        """Encode the images that are not in the cache; returns how many that were.

        `encode` maps [B, 3, H, W] in [-1, 1] to [B, C, h, w]; `identity` stands for all that it depends on.
        Of a shard (index, count) only every count-th image is handled. `on_progress` is given (done, all).

        Raises:
            DataError: An image changed or vanished since it was inspected, or latents are not finite.
            StorageError: The cache cannot be written.
        """
        self._latents_identity = identity
        index, num_shards = shard
        requests: dict[str, dict[str, LatentRequest]] = {name: {} for name in self._stores}
        for image in self._images[index::num_shards]:
            request = self._request(image, identity)
            requests[image.sample.dataset_id][request.key] = request
        total = sum(map(len, requests.values()))
        added = done_before = 0
        for dataset_id, wanted in requests.items():
            added += fill_latents(
                self._stores[dataset_id],
                list(wanted.values()),
                encode=encode,
                batch_size=batch_size,
                on_progress=_shifted(on_progress, done_before, total),
            )
            done_before += len(wanted)
        return added

    def cache_text(
        self,
        encode: Callable[[Sequence[str]], list[TextEmbeds]],
        *,
        identity: str,
        batch_size: int,
        extra: Sequence[str] = (),
        shard: tuple[int, int] = (0, 1),
    ) -> int:
        """Encode the captions and the extra prompts that are not in the cache; returns how many that were.

        `encode` gives one embedding per prompt, with a batch axis of 1; `identity` stands for all that it
        depends on. Of a shard (index, count) only every count-th prompt is handled.

        Raises:
            DataError: An embedding is not finite.
            StorageError: The cache cannot be written.
        """
        self._texts = TextCache(TensorStore(self._text_folder), identity=identity)
        return self._texts.fill((*self.captions(), *extra), encode, batch_size=batch_size, shard=shard)

    def text_embeds(self, prompt: str) -> TextEmbeds:
        """The cached embedding of a prompt, with a batch axis of 1, on the CPU.

        Raises:
            DataError: It is not in the cache.
        """
        assert self._texts is not None, "cache_text comes before text_embeds"
        embeds = self._texts.get(prompt)
        if embeds is None:
            raise DataError(
                f"The text cache in {printable(str(self._text_folder))} lacks the prompt "
                f"{printable(prompt[:80])!r}. Start again: what is missing is encoded at the start."
            )
        return embeds

    def batches(self, *, start: int = 0) -> Iterator[Batch]:
        """This process's micro-batches without end, from the one with number `start`.

        The start is found at once, without going through what lies before. A thread reads one batch ahead.

        Raises:
            DataError: A cache entry is missing or damaged.
        """
        return prefetch(count(start), self._batch)

    def _batch(self, index: int) -> Batch:
        draw = self._sampler.draw(index)
        members = self._buckets[draw.bucket][1]
        first = self.process_index * self.batch_size
        own = draw.samples[first : first + self.batch_size]
        start = index * self.batch_size * self.num_processes + first
        sample_indices = tuple(range(start, start + self.batch_size))
        images = [members[member] for member in own]
        samples = tuple(map(self._drawn, images, sample_indices))
        return Batch(
            latents=torch.stack([self._latents(image) for image in images]),
            text=self.stack_text([self.text_embeds(sample.caption) for sample in samples]),
            samples=samples,
            sample_indices=sample_indices,
        )

    def _drawn(self, image: PlannedImage, position: int) -> Sample:
        """The image's sample with the caption it has at a position."""
        if mix(self.seed, "caption dropout", position) < self.caption_dropout * _MIX_RANGE:
            return replace(image.sample, caption="")
        choice = mix(self.seed, "caption choice", position) % len(image.captions)
        return replace(image.sample, caption=image.captions[choice])

    def _latents(self, image: PlannedImage) -> Tensor:
        assert self._latents_identity is not None, "cache_latents comes before batches"
        store = self._stores[image.sample.dataset_id]
        latents = read_latents(store, _latents_key(image, self._latents_identity))
        if latents is None:
            raise DataError(
                f"The latents of {image.sample.path} (dataset {image.sample.dataset_id!r}) are not in "
                f"{printable(str(store.folder))}. Start again: what is missing is encoded at the start."
            )
        return latents

    def _request(self, image: PlannedImage, identity: str) -> LatentRequest:
        return LatentRequest(
            key=_latents_key(image, identity),
            name=image.sample.path,
            size=image.sample.target_px,
            load=lambda: load_pixels(image),
        )

    def _latents_folder(self, config: DatasetConfig) -> Path:
        folder = config.cache_dir_vae or self.data.cache_dir_vae / config.id
        return _outside_the_data(folder, self.datasets)

    def _report(self) -> None:
        """Say which images are drawn more often than the settings ask for, because batches are whole."""
        size = self.batch_size * self.num_processes
        small = [
            f"{printable(bucket.name)} ({bucket.num_samples})"
            for bucket, _ in self._buckets
            if bucket.num_samples < size
        ]
        if small:
            logger.warning(
                "%d of %d buckets have fewer images than a batch of %d and repeat them within it: %s.",
                len(small),
                len(self._buckets),
                size,
                ", ".join(small[:_SHOWN]) + (", ..." if len(small) > _SHOWN else ""),
            )
        wanted = sum(bucket.samples_per_epoch for bucket, _ in self._buckets)
        logger.info(
            "An epoch draws %d images for %d wanted: %d batches of %d.",
            self.batches_per_epoch * size,
            wanted,
            self.batches_per_epoch,
            size,
        )


def load_pixels(image: PlannedImage) -> Tensor:
    """Read a planned image as [3, H, W] float32 in [-1, 1], resized and cut as planned.

    Raises:
        DataError: The file changed or vanished since it was inspected.
    """
    try:
        data = read_bounded(image.file, limit=MAX_FILE_BYTES)
        if content_digest(data) != image.digest:
            raise DataError("it changed while the run was starting")
        pixels = decode_image(data)
    except DataError as error:
        raise DataError(f"{printable(str(image.file.path))}: {error}. Start again.") from error
    sample = image.sample
    return resize_and_crop(
        pixels, sample.resized_px, top_left=sample.crop_top_left, target_px=sample.target_px
    )


def _latents_key(image: PlannedImage, identity: str) -> str:
    sample = image.sample
    placed = f"{sample.resized_px} {sample.crop_top_left} {sample.target_px}"
    return content_key(_PIXELS_VERSION, image.digest, placed, identity)


def _planned(config: DatasetConfig, settings: PlanSettings, *, cache: Path) -> DatasetPlan:
    index = ImageIndex(cache / f"images_{file_name(config.id)}.json")
    plan = plan_dataset(config, settings, index=index)
    index.save()
    sizes = Counter(image.sample.target_px for image in plan.images)
    logger.info(
        "Dataset %s: %d images (%d skipped) in %d buckets: %s.",
        config.id,
        len(plan.images),
        len(plan.skipped),
        len(sizes),
        ", ".join(f"{size}: {number}" for size, number in sorted(sizes.items())),
    )
    return plan


def _buckets_of(plan: DatasetPlan) -> list[tuple[Bucket, list[PlannedImage]]]:
    """The buckets of a dataset, by size; batches never mix datasets, whose repeats differ."""
    members: dict[str, list[PlannedImage]] = {}
    for image in sorted(plan.images, key=lambda image: image.sample.target_px):
        members.setdefault(f"{plan.config.id} {image.sample.target_px}", []).append(image)
    share = (plan.config.repeats + 1) * plan.config.probability
    return [
        (
            Bucket(name=name, num_samples=len(images), samples_per_epoch=max(1, round(len(images) * share))),
            images,
        )
        for name, images in members.items()
    ]


def _outside_the_data(folder: Path, datasets: Sequence[DatasetConfig]) -> Path:
    """The folder, when it lies in no dataset's folder.

    Raises:
        DataError: It does; nothing is ever written beside a user's images.
    """
    for dataset in datasets:
        if folder.resolve().is_relative_to(dataset.instance_data_dir.resolve()):
            raise DataError(
                f"The cache folder {printable(str(folder))} lies inside instance_data_dir of dataset "
                f"{dataset.id!r}. Choose a cache folder outside of it."
            )
    return folder


def _shifted(
    on_progress: Callable[[int, int], None] | None, done_before: int, total: int
) -> Callable[[int, int], None] | None:
    """A progress callback for one of several parts, counting over all of them."""
    return None if on_progress is None else lambda done, _: on_progress(done_before + done, total)

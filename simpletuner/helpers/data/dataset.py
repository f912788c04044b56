"""Images and captions to cache requests and to batches.

Shapes: B batch, C latent channels, H W image height and width, h w latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner.helpers.caching.filling import CacheRequest, CacheRequests
from simpletuner.helpers.caching.masks import read_cached_mask
from simpletuner.helpers.caching.memory import EntryStore, MemoryStore
from simpletuner.helpers.caching.prefetch import LoaderWatch, prefetch
from simpletuner.helpers.caching.recent import GIB
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig, slider_strengths
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig, MaskConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig, TrainingConfig
from simpletuner.helpers.contracts import Batch, Sample, TextEmbeds
from simpletuner.helpers.data.cache_reader import CachedItem, CacheReader
from simpletuner.helpers.data.caption_variants import caption_plan, limit_problem
from simpletuner.helpers.data.columns import joined
from simpletuner.helpers.data.conditioning import ConditioningFinder, entries_of
from simpletuner.helpers.data.cropping import with_new_crop
from simpletuner.helpers.data.epoch_report import report_epochs
from simpletuner.helpers.data.facts import facts_of
from simpletuner.helpers.data.held_out import Divided, divided
from simpletuner.helpers.data.index import FORGOTTEN, ImageIndex, index_file
from simpletuner.helpers.data.made_references import DepthEstimator
from simpletuner.helpers.data.masks import is_blank
from simpletuner.helpers.data.mirroring import is_mirrored, mirrored
from simpletuner.helpers.data.on_demand import Loaded, OnDemand
from simpletuner.helpers.data.phases import (
    Calendar,
    Curriculum,
    DatasetBuckets,
    gap_problem,
    has_steps,
)
from simpletuner.helpers.data.planned import DatasetPlan, Members, PlannedImage, PlannedMask
from simpletuner.helpers.data.planning import plan_dataset, without_damaged
from simpletuner.helpers.data.references import PlannedReference, drawn_references
from simpletuner.helpers.data.requests import DataRequests, bucket_of
from simpletuner.helpers.data.sampler import Draw, shuffled
from simpletuner.helpers.data.sources.base import SkippedImage
from simpletuner.helpers.errors import CacheEntryError, DataError
from simpletuner.helpers.io.atomic import JsonValue
from simpletuner.helpers.io.names import counted, file_name, printable
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.randomness import mix

logger = logging.getLogger(__name__)

_WHOLE = 1 << 63  # above every value of `mix`


@dataclass(eq=False)
class TrainingData:
    """The samples of all datasets, their cache entries, and the endless sequence of batches.

    Construction scans the folders and fixes samples and order; it needs no model. The order depends only on
    the seed, the data and the global batch size (batch_size times num_processes), so runs on other numbers
    of processes with the same global batch size see the same global batches.

    Raises:
        DataError: A dataset has no usable image, a caption cannot be used, captions have too many variants,
            a cache folder lies inside a dataset's folder, or no dataset takes part in a step.
    """

    datasets: Sequence[DatasetConfig]
    data: DataConfig
    _: KW_ONLY
    seed: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    pixel_alignment: int
    """Width and height of buckets are multiples of this, unless aspect_bucket_alignment is set; pixels."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of the run and of its steps, for datasets that begin or end within it."""
    caption_dropout: float = 0.0
    """Share of draws that train without a caption, of datasets that set none."""
    balances_regularisation: bool = False
    """An epoch draws as many regularisation images as others, whatever their repeats and probability say."""
    conditioning: Sequence[ConditioningConfig | ReferenceConfig] = ()
    """The entries that the datasets' conditioning_data names."""
    caches_text: bool = True
    """Whether prompt embeds are read from the cache; else batches have none."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """How masks weight the loss."""
    depth: DepthEstimator | None = None
    """Estimates the depth of images; None if no reference is made of it."""
    pins_batches: bool = False
    """Batches lie in page-locked memory, for CUDA."""
    index_folder: Path | None = None
    """Holds the indexes that cannot lie in the caches, because these are off or cannot be written; None for
    the caches only."""
    watch: LoaderWatch = field(default_factory=LoaderWatch)
    """Of the wait for batches and for the inputs of the caches."""

    samples: Sequence[Sample] = field(init=False)
    """Every trained image once, with its first caption; each is made when it is asked for."""
    divided: Divided = field(init=False)
    """The images that are trained, and those that are held out."""
    skipped: tuple[SkippedImage, ...] = field(init=False)
    """Every unusable image."""
    damaged: dict[str, str] = field(init=False)
    """Images whose pixels this process found damaged while it loaded them; digest -> reason."""
    calendar: Calendar = field(init=False)
    """Where the epochs end among the micro-batches of each process."""

    def __post_init__(self) -> None:
        active = [each for each in self.datasets if not each.disabled]
        self._text_store = self._store(self.data.cache_dir_text, is_kept=not self.data.text_cache_disable)
        self._latents_stores = {
            each.id: self._store(self.data.latents_folder(each), is_kept=self.data.keeps_latents(each))
            for each in active
        }
        self._indexes = {each.id: self._index(each, each) for each in active}
        self._entries = {each.id: entries_of(each, self.conditioning) for each in active}
        self._entry_indexes = {
            (each.id, entry.id): self._index(each, entry)
            for each in active
            for entry in self._entries[each.id]
        }
        self._cached = CacheReader(
            self._text_store,
            self._latents_stores,
            seed=self.seed,
            masks=self.masks,
            depth=self.depth,
            watch=self.watch,
            caches_text=self.caches_text,
            text_memory_bytes=0 if self.data.text_cache_disable else int(self.data.text_cache_memory * GIB),
        )
        self._bad: set[str] = set()
        self._on_demand: OnDemand | None = None
        self._strengths = slider_strengths(active)
        self.damaged = {}
        self._requests = DataRequests(self._cached, masks=self.masks, depth=self.depth, damaged=self.damaged)
        self._follow([self._plan(each) for each in active])
        several = {
            plan.config.id: sum(1 for _ in plan.images.captions.all())
            for plan in self.divided.trained
            if plan.caption_plan.num_variants > 1
        }
        if problem := limit_problem(several):
            raise DataError(problem)

    def captions(self) -> tuple[str, ...]:
        """Every variant of a caption once, in the order of the images; "" first when captions are dropped.

        Then the first variant of each held-out image, then the captions of references.
        """
        trained = self.divided.trained
        texts = [text for plan in trained for text in plan.images.captions.all()]
        texts += [image.sample.caption for image in self.divided.held_out]
        texts += [text for each in self.divided.references() for text in each.captions]
        drops = any(plan.caption_plan.config.caption_dropout_probability for plan in trained)
        return tuple(dict.fromkeys(["", *texts] if drops else texts))

    def facts(self) -> dict[str, JsonValue]:
        """Number and identity of the images and captions, and the global batch size, to find changes by."""
        facts: dict[str, JsonValue] = {
            "samples per batch of all processes": self.batch_size * self.num_processes
        }
        for plan in self.divided.trained:
            dataset = redacted(f"dataset {plan.config.id}")
            facts |= facts_of(plan.images, dataset, content_of=self._cached.content)
            if plan.config.train_batch_size is not None:
                facts[f"{dataset}, samples per batch"] = plan.config.train_batch_size * self.num_processes
        for images in self.divided.held_parts:
            owner = redacted(f"held-out part of dataset {images.dataset_id}")
            facts |= facts_of(images, owner, content_of=self._cached.content)
        return facts

    def set_encoders(self, *, vae_identity: str, text_identity: str) -> None:
        """Set the identities of the encoders, which are part of the cache keys."""
        self._cached.set_encoders(vae_identity=vae_identity, text_identity=text_identity)

    def latents_requests(self) -> CacheRequests[Tensor]:
        """A request for the latents of each image, by bucket, the held-out ones last; then of each reference.

        Inputs are [3, H, W] in [-1, 1].
        """
        return self._requests.latents(self._buckets, self.divided, flipped=self._flipped)

    def mask_requests(self) -> list[CacheRequest[Tensor]]:
        """A request for each mask in its image's crop; inputs are those of `read_mask`."""
        return self._requests.of_masks(self.divided)

    def text_requests(self, prompts: Sequence[str] = ()) -> CacheRequests[str]:
        """A request for the embeddings of each caption and of these prompts.

        Those of the prompts and of dropped captions are read at once, since no other can take their place.
        """
        return self._requests.texts((*self.captions(), *prompts), vital={"", *prompts})

    def encode_on_demand(self, on_demand: OnDemand) -> None:
        """Encode what the caches lack once a batch needs it."""
        self._on_demand = on_demand

    def flush(self) -> None:
        """Write what was encoded on demand since the last shards, and forget images that changed meanwhile.

        Raises:
            StorageError: A shard or an index cannot be written.
        """
        for store in (self._text_store, *self._latents_stores.values()):
            store.flush()
        self._mark_damaged({digest: why for digest, why in self.damaged.items() if FORGOTTEN in why})

    def leave_out(self, damaged: Mapping[str, str]) -> None:
        """Leave damaged images out of this run's samples and of later runs' too; list them as skipped.

        Every process must leave out the same ones, so that all have the same batches.

        Args:
            damaged: The digest of an image, a mask or a reference, or the key of a mask -> the reason.

        Raises:
            DataError: A dataset has no image left.
        """
        if not damaged:
            return
        self._mark_damaged(damaged)
        plans = [without_damaged(plan, damaged) for plan in self._plans]
        for before, plan in zip(self._plans, plans, strict=True):
            if plan is not before:
                _log_plan(plan)
        self._follow(plans)

    def _mark_damaged(self, damaged: Mapping[str, str]) -> None:
        for index in (*self._indexes.values(), *self._entry_indexes.values()) if damaged else ():
            index.mark_damaged(damaged)
            index.save()

    def text_embeds(self, prompt: str) -> TextEmbeds:
        """The cached embeddings of a prompt, with a batch axis of 1, on the CPU.

        Raises:
            DataError: They are not cached.
        """
        return self._cached.text_embeds(prompt)

    def batches(self, *, start: int = 0) -> Iterator[Batch]:
        """This process's micro-batches without end, from number `start` on; a thread reads one batch ahead.

        No earlier batch is computed to find the start.

        Raises:
            DataError: A cache entry is missing or damaged; on demand, an image changed or vanished.
            LoaderTimeoutError: A batch took longer than loader_timeout_seconds.
            Preempted: A stop signal arrived while one was waited for.
        """
        if self._on_demand is None:
            yield from prefetch(count(start), self._batch, watch=self.watch)
            return
        load = partial(self._loaded, self._on_demand)
        for index, loaded in prefetch(count(start), load, watch=self.watch):
            with self._on_demand.encoded(loaded):
                batch = self._batch(index)
            yield batch

    def batches_before(self, num_samples: int) -> int:
        """Micro-batches of each process that the run has drawn after this number of samples of all.

        Raises:
            CheckpointError: A batch would end at another number.
        """
        return self._curriculum.batches_before(num_samples)

    def evaluated_item(self, image: PlannedImage, *, index: int) -> CachedItem:
        """The cached tensors of an image as it is evaluated: always those of its first caption.

        Of several references it has those of the first epoch.

        Args:
            image: Trained or held out.
            index: Decides over a mask that applies to a share of the samples.

        Raises:
            CacheEntryError: An entry is missing or damaged; on demand, the image is.
        """
        references = self._references(image, epoch=0)
        caption = next((text for each in references for text in each.captions), image.sample.caption)
        sample = replace(image.sample, caption=caption)
        read = partial(self._cached.item, image, sample, references=references, sample_index=index)
        if self._on_demand is None:
            return read()
        requests = self._requests_of(sample, (image, *references))
        loaded = None if image.fault(self.damaged) else self._on_demand.load(requests)
        if loaded is None:
            fault = image.fault(self.damaged)
            raise CacheEntryError(f"{image.sample.path} cannot be used: {fault}. Replace or remove it.")
        with self._on_demand.encoded(loaded):
            return read()

    def evaluated_batch_size(self, image: PlannedImage) -> int:
        """Samples of an evaluated image in a forward pass: as many as its dataset has in a batch."""
        own = next(each.train_batch_size for each in self.datasets if each.id == image.sample.dataset_id)
        return own or self.batch_size

    def evaluated_strength(self, image: PlannedImage) -> float:
        """The adapter's strength for an evaluated image: its dataset's, 1 for a neutral one."""
        own = next(each.slider_strength for each in self.datasets if each.id == image.sample.dataset_id)
        return 1.0 if own is None else own

    def _batch(self, index: int) -> Batch:
        draw = self._curriculum.draw(index)
        items = [self._item_or_next(draw, slot) for slot in self._slots(draw)]
        sample_indices = tuple(draw.first_sample + slot for slot in self._slots(draw))
        samples = tuple(item.sample for item in items)
        masks = [item.loss_mask for item in items if item.loss_mask is not None]
        batch = Batch(
            latents=torch.stack([item.latents for item in items]),
            text=TextEmbeds.stack([item.text for item in items]),
            samples=samples,
            sample_indices=sample_indices,
            is_regularisation=samples[0].dataset_id in self._regularisation,
            strength=self._strength(samples[0].dataset_id, draw.turn),
            # All images of a dataset have masks, or none.
            loss_mask=torch.stack(masks) if masks else None,
            references=tuple(
                torch.stack(column) for column in zip(*(item.references for item in items), strict=True)
            ),
        )
        return batch.pinned() if self.pins_batches else batch

    def _references(self, image: PlannedImage, *, epoch: int) -> tuple[PlannedReference, ...]:
        """The references that an image is trained with in an epoch."""
        if self.data.conditioning_multidataset_sampling == "combined":
            return image.references
        return drawn_references(
            image.sample, image.references, seed=self.seed, epoch=epoch, bucket=bucket_of(image)
        )

    def _slots(self, draw: Draw) -> range:
        """The places of this process in a global batch."""
        size = len(draw.samples) // self.num_processes
        return range(self.process_index * size, (self.process_index + 1) * size)

    def _candidates(
        self, draw: Draw, slot: int
    ) -> Iterator[tuple[PlannedImage, Sample, tuple[PlannedReference, ...]]]:
        """The image of a place in a batch with its caption and references, then those that may replace it."""
        members = self._buckets[draw.bucket][1]
        for offset in range(len(members)):
            image = members[(draw.samples[slot] + offset) % len(members)]
            references = self._references(image, epoch=draw.epoch)
            if image.sample.dataset_id in self._cropped_anew:
                cropped = with_new_crop(image.sample, name=image.file.name, seed=self.seed, epoch=draw.epoch)
                image = replace(image, sample=cropped)
            if image.sample.dataset_id in self._flipped and is_mirrored(
                image.sample, seed=self.seed, pass_index=draw.passes[slot]
            ):
                image, references = mirrored(image), tuple(map(mirrored, references))
            sample = self._with_caption(
                image, draw.passes[slot], draw.first_sample + slot, references=references
            )
            yield image, sample, references

    def _item_or_next(self, draw: Draw, slot: int) -> CachedItem:
        """The cached item of a place in a batch, or of the next image whose entries are all whole.

        Raises:
            DataError: No image of the bucket has whole ones.
        """
        problem = ""
        for image, sample, references in self._candidates(draw, slot):
            try:
                return self._cached.item(
                    image, sample, references=references, sample_index=draw.first_sample + slot
                )
            except CacheEntryError as error:
                problem = str(error)
                instead = f"Until then the next image of its size is trained in place of {image.sample.path}."
                self._report_bad(image, f"{problem} {instead}")
        raise DataError(f"No image of this size has whole cache entries. {problem}")

    def _loaded(self, on_demand: OnDemand, index: int) -> tuple[int, list[Loaded]]:
        """The number of a batch, and the inputs of the entries that it lacks."""
        draw = self._curriculum.draw(index)
        loaded: list[Loaded] = []
        for slot in self._slots(draw):
            for image, sample, references in self._candidates(draw, slot):
                requests = self._requests_of(sample, (image, *references))
                own = None if image.fault(self.damaged) else on_demand.load(requests)
                if own is not None:
                    loaded += own
                    break
                fault = f"{image.sample.path} cannot be used: {image.fault(self.damaged)}."
                self._report_bad(image, f"{fault} The next image of its size is trained in its place.")
        return index, loaded

    def _requests_of(
        self, sample: Sample, images: Sequence[PlannedImage | PlannedReference]
    ) -> Iterator[CacheRequest[Any]]:
        """The entries of a sample."""
        for each in images:
            cut = each.sample
            yield self._requests.of_image(
                each, name=cut.path, batch_group=f"{cut.dataset_id} {cut.target_px}"
            )
            if isinstance(each, PlannedImage) and each.mask is not None:
                yield self._requests.of_mask(each, each.mask)
        if self.caches_text:
            yield self._requests.of_text(sample.caption)

    def _report_bad(self, image: PlannedImage, text: str) -> None:
        """Say once that the next image of its bucket takes the place of this one."""
        if image.digest not in self._bad:
            self._bad.add(image.digest)
            # An error, because only the first process shows warnings.
            logger.error("%s", text)

    def _strength(self, dataset_id: str, turn: int) -> float:
        """The adapter's strength in a batch of a dataset; a neutral one takes those of the others in turn.

        Each turn has an order of its own, else the variants of a caption could take turns with them.
        """
        if not self._strengths:
            return 1.0
        own = next(each.slider_strength for each in self.datasets if each.id == dataset_id)
        if own is not None:
            return own
        cycle, place = divmod(turn, len(self._strengths))
        order = shuffled(self.seed, "strength", cycle, length=len(self._strengths))
        return self._strengths[int(order[place])]

    def _is_known_blank(self, config: DatasetConfig, mask: PlannedMask) -> bool:
        """Whether a mask was read in an earlier run and leaves nothing of its image."""
        values = read_cached_mask(self._latents_stores[config.id], mask.key)
        return values is not None and is_blank(values, mask.kind, self.masks)

    def _with_caption(
        self,
        image: PlannedImage,
        pass_index: int,
        sample_index: int,
        *,
        references: Sequence[PlannedReference],
    ) -> Sample:
        """The image's sample with a caption drawn by the global sample index, in the variant of this pass.

        Captions of its references stand for its own.
        """
        instead = [(text,) for each in references for text in each.captions]
        captions = instead or image.captions
        choice = mix(self.seed, "caption choice", sample_index) % len(captions)
        variants = captions[choice]
        plan = self._caption_plans[image.sample.dataset_id]
        caption = plan.of_sample(variants[pass_index % len(variants)], sample_index)
        return replace(image.sample, caption=caption)

    @property
    def keeps_all_latents(self) -> bool:
        """Whether the latents of every dataset are cached."""
        return all(map(self._requests.is_kept, self._latents_stores))

    def _store(self, folder: Path, *, is_kept: bool) -> EntryStore:
        """The store in a folder, which must lie outside every dataset's: nothing is written beside images."""
        for dataset_id, images in self._folders():
            if folder.resolve().is_relative_to(images.resolve()):
                raise DataError(
                    f"The cache folder {printable(str(folder))} lies inside instance_data_dir of dataset "
                    f"{dataset_id!r}. Choose a cache folder outside it."
                )
        return TensorStore(folder) if is_kept else MemoryStore(folder)

    def _index(
        self, dataset: DatasetConfig, entry: DatasetConfig | ConditioningConfig | ReferenceConfig
    ) -> ImageIndex:
        """The index of a dataset, or of an entry that conditions it."""
        cached = index_file(self._latents_stores[dataset.id].folder, entry)
        if self.index_folder is None:
            return ImageIndex(cached)
        own = index_file(self.index_folder / file_name(dataset.id), entry)
        return ImageIndex(own) if self.data.vae_cache_disable else ImageIndex(cached, copy=own)

    def _folders(self) -> list[tuple[str, Path]]:
        """Id and folder of each entry with images, masks or references on this machine."""
        entries = (*self.datasets, *self.conditioning)
        return [(each.id, each.folder) for each in entries if each.folder is not None]

    def _plan(self, config: DatasetConfig) -> DatasetPlan:
        index, entries = self._indexes[config.id], self._entries[config.id]
        indexes = {entry.id: self._entry_indexes[config.id, entry.id] for entry in entries}
        plan = plan_dataset(
            config,
            index=index,
            conditioning=ConditioningFinder(config, entries, index_of=lambda entry: indexes[entry.id]),
            is_known_blank=partial(self._is_known_blank, config),
            seed=self.seed,
            alignment=self.data.alignment(self.pixel_alignment),
            aspect_decimals=self.data.aspect_bucket_rounding,
            caption_plan=caption_plan(
                config, self.data, seed=self.seed, caption_dropout=self.caption_dropout
            ),
        )
        for each in (index, *indexes.values()):
            each.save()
        _log_plan(plan)
        return plan

    def _follow(self, plans: Sequence[DatasetPlan]) -> None:
        """Take samples and order from the datasets' plans."""
        self._plans = plans
        self.divided = divided(plans)
        plans = self.divided.trained
        self._caption_plans = {plan.config.id: plan.caption_plan for plan in plans}
        members = [_members(plan) for plan in plans]
        self._buckets = [bucket for each in members for bucket in each.items()]
        self._regularisation = {plan.config.id for plan in plans if plan.config.is_regularisation_data}
        self._cropped_anew = {plan.config.id for plan in plans if plan.config.vae_cache_clear_each_epoch}
        self._flipped = {plan.config.id for plan in plans if plan.config.random_flip}
        self._curriculum = Curriculum(
            [
                DatasetBuckets(
                    plan.config,
                    {name: len(images) for name, images in each.items()},
                    batch_size=(plan.config.train_batch_size or self.batch_size) * self.num_processes,
                )
                for plan, each in zip(plans, members, strict=True)
            ],
            seed=self.seed,
            batches_per_step=self.training.gradient_accumulation_steps,
            balances=self.balances_regularisation,
        )
        self.calendar = self._curriculum.calendar
        if problem := gap_problem(self.calendar, self.training):
            raise DataError(problem)
        self.samples = joined([plan.images.samples for plan in plans])
        self.skipped = tuple(each for plan in self._plans for each in plan.skipped)
        report_epochs(self._curriculum, self.training)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches per process in the first epoch."""
        return self.calendar.stretches[0].length

    @property
    def counts_steps(self) -> bool:
        """Whether a dataset begins or ends at an optimiser step."""
        return has_steps([plan.config for plan in self.divided.trained])


def _log_plan(plan: DatasetPlan) -> None:
    sizes = plan.images.members()
    logger.info(
        "Dataset %s: %s (%d skipped) in %s: %s.",
        plan.config.id,
        counted(len(plan.images), "image"),
        len(plan.skipped),
        counted(len(sizes), "bucket"),
        ", ".join(f"{name}: {len(rows)}" for (_, name), rows in sorted(sizes.items(), key=itemgetter(0))),
    )


def _members(plan: DatasetPlan) -> dict[str, Members]:
    """The buckets of a dataset by size and sizes of references."""
    return {
        f"{plan.config.id} {name}": Members(plan.images, rows)
        for (_, name), rows in plan.images.members().items()
    }

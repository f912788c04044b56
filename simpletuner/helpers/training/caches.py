"""Fills the caches of latents and prompt embeddings; each encoder is in memory only while it is needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import gather_object

from simpletuner.helpers.caching.filling import MASK, TEXT_ENCODER, VAE, CacheRequest, encode_missing
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.masks import mask_entries
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.data.on_demand import Encode, OnDemand
from simpletuner.helpers.data.sources.base import expect
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.reporting.progress_bar import duration

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from simpletuner.helpers.caching.prefetch import LoaderWatch
    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.configuration.schema.sections import RunConfig, ValidationConfig
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.sampling.prompts import PromptSpec

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0

Input = TypeVar("Input")


def fill_caches(
    data: TrainingData,
    validation_prompts: Sequence[PromptSpec],
    *,
    config: RunConfig,
    family: ModelFamily,
    accelerator: Accelerator,
    preemption: Preemption,
) -> None:
    """Encode the images, captions and validation prompts that are not cached, divided among the processes.

    A run that trains text encoders caches no captions and prompts; what is encoded on demand, or not cached
    at all, is left to the batches.

    Images whose pixels turn out to be damaged are left out of the data.

    Raises:
        Preempted: A signal came; the entries encoded so far are kept.
        DataError: An image changed or vanished since the scan, every image of a dataset is damaged, or an
            encoded value is not finite.
        ModelError: An encoder cannot be loaded.
        StorageError: An entry cannot be written.
    """
    encoders = _Encoders(family)
    data.set_encoders(vae_identity=family.vae_identity, text_identity=family.text_identity)
    shard = accelerator.process_index, accelerator.num_processes
    fill = partial(_fill, shard=shard, preemption=preemption, watch=data.watch)
    image_size, text_size = config.precision.vae_batch_size, config.data.text_encoder_batch_size
    on_demand: dict[str, tuple[Encode, int]] = {}
    if not (config.data.vae_cache_ondemand or config.data.vae_cache_disable):
        fill(("image", "images"), data.latents_requests(), encoders.encode_images, batch_size=image_size)
    if config.data.vae_cache_ondemand or not data.keeps_all_latents:
        on_demand |= {VAE: (encoders.encode_images, image_size), MASK: (mask_entries, 1)}
    else:
        family.unload_vae()
        if data.depth is not None:
            data.depth.unload()
    if masks := data.mask_requests():
        # A mask that is cached while another process still looks for images would leave it with other ones.
        accelerator.wait_for_everyone()
        fill(("mask", "masks"), masks, mask_entries, batch_size=1)
    if data.caches_text:
        texts: Sequence[CacheRequest[str]] = data.text_requests(
            prompts_to_encode(validation_prompts, config.validation)
        )
        if config.data.text_cache_ondemand or config.data.text_cache_disable:
            on_demand[TEXT_ENCODER] = encoders.encode_prompts, text_size
            texts = [each for each in texts if each.is_read_at_once]
        if config.data.text_cache_disable:
            fill = partial(fill, shard=(0, 1))  # nobody reads what another process keeps in memory
        fill(
            ("caption or prompt", "captions and prompts"),
            texts,
            encoders.encode_prompts,
            batch_size=text_size,
        )
    if TEXT_ENCODER not in on_demand:
        family.unload_text_encoders()
    if on_demand:
        data.encode_on_demand(OnDemand(on_demand, watch=data.watch))
    # Waits for every process. All leave out the same images, whichever of them decoded one.
    data.leave_out(dict(gather_object(list(data.damaged.items()))))


@dataclass(slots=True)
class _Encoders:
    """Encode with the family's models, which are loaded when they are first needed."""

    family: ModelFamily
    logged: set[str] = field(default_factory=set)

    def encode_images(self, pixels: list[Tensor]) -> list[dict[str, Tensor]]:
        """The entries of images."""
        self._log("the VAE")
        self.family.load_vae()  # does nothing when it is loaded
        return latents_entries(self.family.encode_images(torch.stack(pixels)))

    def encode_prompts(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """The entries of prompts."""
        self._log("the text encoders")
        self.family.load_text_encoders()
        return [text_entry(embeds) for embeds in self.family.encode_prompts(texts)]

    def _log(self, name: str) -> None:
        if name not in self.logged:
            logger.info("Loading %s.", name)
        self.logged.add(name)


def prompts_to_encode(prompts: Sequence[PromptSpec], validation: ValidationConfig) -> list[str]:
    """The texts that validation reads, each once; none without a prompt."""
    texts = {prompt.text for prompt in prompts}
    return sorted({*texts, validation.validation_negative_prompt} if prompts else texts)


def _fill(
    noun: tuple[str, str],
    requests: Sequence[CacheRequest[Input]],
    encode: Callable[[list[Input]], Sequence[Mapping[str, Tensor]]],
    *,
    batch_size: int,
    shard: tuple[int, int],
    preemption: Preemption,
    watch: LoaderWatch,
) -> None:
    """Fill one cache, log the progress, and stop before a batch if a signal came.

    `noun` is the singular and the plural of what is encoded.
    """

    # Not without a batch: with several processes all must reach the next barrier.
    def encode_unless_stopped(inputs: list[Input]) -> Sequence[Mapping[str, Tensor]]:
        preemption.check(f"encoding {noun[1]}")
        return encode(inputs)

    started_s = logged_s = time.monotonic()
    num_encoded = total = 0
    for num_encoded, total in encode_missing(
        requests, encode_unless_stopped, batch_size=batch_size, shard=shard, watch=watch, expect=expect
    ):
        if time.monotonic() - logged_s >= SECONDS_BETWEEN_LINES:
            logged_s = time.monotonic()
            left_s = (logged_s - started_s) / num_encoded * (total - num_encoded)
            logger.info("Encoded %d of %d %s, %s left.", num_encoded, total, noun[1], duration(left_s))
    if total:
        encoded = counted(num_encoded, *noun)
        logger.info("Encoded %s in %.1f s.", encoded, time.monotonic() - started_s)
    else:
        logger.info("All %s are cached.", noun[1])

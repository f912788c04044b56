"""Device memory of a run by phase: captions, latents, training, validation images. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from simpletuner.helpers.choices.precisions import PRECISIONS, Precision
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.estimating.run_facts import RunFacts
from simpletuner.helpers.models.component_memory import vae_working_bytes
from simpletuner.helpers.models.memory_model import Block, Layout, kept_bytes, recomputed_bytes, working_bytes

SHOWN_EDGES_PX = (512, 768, 1024)
SHOWN_BATCHES = (1, 2, 4)
CONTEXT_BYTES = 3 * 2**28
"""Of a GPU's context, workspaces of libraries, and the allocator's reserve: 0.75 GiB, not measured."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run, with what is in device memory at its peak."""

    name: str
    parts: Mapping[str, int]
    """Name -> bytes, without empty parts."""

    @property
    def num_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


def phases_of(facts: RunFacts) -> tuple[Phase, ...]:
    """The phases of a run, in their order."""
    found = [
        ("captions", _captions(facts)),
        ("latents", _latents(facts)),
        ("training", _training(facts)),
        ("validation images", _validation(facts)),
    ]
    return tuple(
        Phase(name, {part: number for part, number in {**parts, "context": CONTEXT_BYTES}.items() if number})
        for name, parts in found
        if parts
    )


def text_encoder_bytes(facts: RunFacts) -> int:
    """Bytes of all text encoders, which are loaded together."""
    unquantised = facts.arithmetic.compute_bytes
    return sum(
        encoder.weight_bytes(precision, unquantised=unquantised)
        for encoder, precision in zip(facts.text_encoders, _text_precisions(facts), strict=False)
    )


def _text_precisions(facts: RunFacts) -> list[Precision]:
    section = facts.run.precision
    names = (
        section.text_encoder_1_precision,
        section.text_encoder_2_precision,
        section.text_encoder_3_precision,
        section.text_encoder_4_precision,
    )
    return [PRECISIONS[name] for name in names]


def _captions(facts: RunFacts) -> dict[str, int]:
    batch_size = facts.run.data.text_encoder_batch_size
    working = max(
        encoder.working_bytes(batch_size, bytes_per_number=facts.arithmetic.compute_bytes)
        for encoder in facts.text_encoders
    )
    return {"text encoders": text_encoder_bytes(facts), "encoding": working}


def _encoding_pixels(facts: RunFacts, batch_size: int) -> int:
    """Bytes of encoding a batch of the largest images."""
    size = facts.training_size
    tiles = facts.run.precision.vae_enable_tiling
    return batch_size * vae_working_bytes(size.height * size.width, decodes=False, tiles=tiles)


def _latents(facts: RunFacts) -> dict[str, int]:
    return {"VAE": facts.vae_bytes, "encoding": _encoding_pixels(facts, facts.run.precision.vae_batch_size)}


def _training(facts: RunFacts) -> dict[str, int]:
    run, memory = facts.run, facts.step_memory
    parts = {
        "weights": device_weights(facts),
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "optimiser state": memory.states,
        "EMA": memory.ema if run.ema.ema_device == "accelerator" else 0,
        "activations": memory.activations + memory.recomputed,
        "gradients of activations": memory.working,
    }
    encodes_images = run.data.vae_cache_disable or run.data.vae_cache_ondemand
    if encodes_images or any(each.vae_cache_clear_each_epoch for each in run.datasets):
        parts["VAE"] = facts.vae_bytes + _encoding_pixels(facts, 1)
    if run.trains_text:
        parts["text encoders"] = text_encoder_bytes(facts) + _trained_text_bytes(facts)
    elif run.data.text_cache_disable or run.data.text_cache_ondemand:
        parts["text encoders"] = text_encoder_bytes(facts)
    return parts


def _trained_text_bytes(facts: RunFacts) -> int:
    """About what trained text encoders keep for the backward pass: 10 widths and 3 feed-forwards a layer."""
    numbers = sum(
        each.tokens * each.layers * (10 * each.width + 3 * each.hidden) for each in facts.text_encoders
    )
    return facts.largest_batch * numbers * facts.arithmetic.compute_bytes


def _validation(facts: RunFacts) -> dict[str, int]:
    size, run = facts.validation_size, facts.run
    if size is None:
        return {}
    training = _training(facts)
    stays = ("weights", "adapter", "optimiser state", "EMA")
    denoising = working_bytes(facts.layout(size), facts.step(num_passes(facts), interval=0))
    tiles = run.precision.vae_enable_tiling
    decoding = vae_working_bytes(size.height * size.width, decodes=True, tiles=tiles)
    return {
        **{name: training[name] for name in stays},
        "text encoders": training.get("text encoders", 0),
        "VAE": facts.vae_bytes,
        "denoising or decoding": max(denoising, decoding),
    }


@dataclass(frozen=True, slots=True)
class Activations:
    """Device memory of activations and their gradients at a size and a batch, beside what does not change."""

    size: Size
    batch_size: int
    recomputed: int
    """Bytes with gradient_checkpointing."""
    kept: int
    """Bytes without."""


def activations_of(facts: RunFacts) -> Iterator[Activations]:
    """Activations at some resolutions and batches, the run's own resolution among them."""
    sizes = {Size(edge, edge) for edge in SHOWN_EDGES_PX} | {facts.training_size}
    for size in sorted(sizes, key=lambda size: size.height * size.width):
        layout = facts.layout(size)
        for batch_size in SHOWN_BATCHES:
            recomputed, kept = (
                kept_bytes(layout, step) + recomputed_bytes(layout, step) + working_bytes(layout, step)
                for step in (facts.step(batch_size, interval=interval) for interval in (1, 0))
            )
            yield Activations(size, batch_size, recomputed, kept)


def num_passes(facts: RunFacts) -> int:
    """Images in a forward pass of a validation image: two with guidance that needs the negative prompt."""
    validation = facts.run.validation
    embeds_guidance = bool(facts.denoiser.get("guidance_embeds"))
    guidance = validation.validation_guidance_real if embeds_guidance else validation.validation_guidance
    return 2 if guidance > 1 else 1


def device_weights(facts: RunFacts) -> int:
    """Bytes of the denoiser's weights on the device: with group offloading one group and what is in none."""
    precision, total = facts.run.precision, facts.step_memory.weights
    if not precision.enable_group_offload:
        return total
    layout = facts.setup.layout
    share = total / (layout.num_weights * facts.arithmetic.compute_bytes)
    group = max(_group_weights(layout, facts)) * share
    outside = sum(layer.num_weights for layer in layout.outside)
    return round((group + outside) * facts.arithmetic.compute_bytes)


def _group_weights(layout: Layout, facts: RunFacts) -> Iterator[int]:
    precision = facts.run.precision
    if precision.group_offload_type == "leaf_level":
        yield from (layer.num_weights for block in layout.blocks for layer in block.layers)
    else:
        number = precision.group_offload_blocks_per_group
        yield from (
            _sum(layout.blocks[start : start + number]) for start in range(0, len(layout.blocks), number)
        )


def _sum(blocks: tuple[Block, ...]) -> int:
    return sum(block.num_weights for block in blocks)

"""Disk space of a run: the model's download, caches, checkpoints. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.estimating.run_facts import RunFacts
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.paths import folder_bytes
from simpletuner.helpers.models.component_memory import VAE_WEIGHTS
from simpletuner.helpers.models.hub_cache import cached_bytes, hub_folder

GIB = 1 << 30
LATENT_PIXELS = 8 * 8
FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """What a run will write into a folder, beside what is there."""

    name: str
    folder: Path
    num_bytes: int


def disk_needs(facts: RunFacts) -> tuple[DiskNeed, ...]:
    """Everything large that a run will write; not the parts whose size is unknown."""
    found = [*_download(facts), *_caches(facts), _checkpoints(facts)]
    return tuple(need for need in found if need.num_bytes > 0)


def disk_problems(needs: Sequence[DiskNeed]) -> list[str]:
    """Sentences on the disks that have less room than what will be written to them."""
    by_disk: dict[int, list[DiskNeed]] = {}
    for need in needs:
        by_disk.setdefault(os.stat(_existing(need.folder)).st_dev, []).append(need)
    problems = []
    for own in by_disk.values():
        free, wanted = shutil.disk_usage(_existing(own[0].folder)).free, sum(each.num_bytes for each in own)
        if wanted > free:
            parts = ", ".join(f"{each.name} {each.num_bytes / GIB:.1f}" for each in own)
            problems.append(
                f"the disk of {printable(str(own[0].folder))} has {free / GIB:.1f} GiB free, and the run "
                f"writes {wanted / GIB:.1f} GiB to it ({parts})"
            )
    return problems


def download_bytes(facts: RunFacts) -> int:
    """Bytes of the model's published files; of a repository that is not known here in 16 bits."""
    model = facts.run.model
    is_known = facts.spec.flavour_of(model.pretrained_model_name_or_path) is not None
    per_weight = facts.memory.PUBLISHED_BYTES if is_known and model.variant != "fp16" else 2
    num_text = sum(each.num_weights for each in facts.text_encoders)
    is_swapped = model.pretrained_unet_model_name_or_path or model.pretrained_transformer_model_name_or_path
    denoiser = 0 if is_swapped else facts.setup.layout.num_weights
    return per_weight * (denoiser + num_text + VAE_WEIGHTS)


def _download(facts: RunFacts) -> Iterator[DiskNeed]:
    source = facts.run.model.pretrained_model_name_or_path
    if not facts.is_local:
        yield DiskNeed("download", hub_folder(), download_bytes(facts) - cached_bytes(source))


def _caches(facts: RunFacts) -> Iterator[DiskNeed]:
    data = facts.run.data
    for dataset in facts.run.datasets:
        number = facts.images[dataset.id]
        if number is None:
            continue
        size = facts.size_of(dataset)
        latents = FLOAT32 * facts.memory.LATENT_CHANNELS * size.height * size.width // LATENT_PIXELS
        if data.keeps_latents(dataset):
            yield _missing(f"latents of {dataset.id}", data.latents_folder(dataset), number * latents)
    numbers = [_num_captions(facts, each) for each in facts.run.datasets]
    if None not in numbers and not (data.text_cache_disable or facts.run.trains_text):
        total = sum(number or 0 for number in numbers) * caption_bytes(facts)
        yield _missing("captions", data.cache_dir_text, total)


def caption_bytes(facts: RunFacts) -> int:
    """Bytes of the embeds of a caption."""
    per_number = max(facts.memory.TEXT_BYTES, facts.arithmetic.compute_bytes)
    return per_number * facts.text_tokens * int(facts.denoiser[facts.memory.TEXT_WIDTH_KEY])


def _num_captions(facts: RunFacts, dataset: DatasetConfig) -> int | None:
    """Captions of a dataset, each variant counted, as if all images had different ones."""
    number = facts.images[dataset.id]
    varies = dataset.enable_wildcard or dataset.caption_tag_dropout_rate > 0 or dataset.arranges_tags
    variants = facts.run.data.caption_variants if varies else 1
    has_one = dataset.only_instance_prompt or (
        dataset.instance_prompt is not None and not dataset.prepend_instance_prompt
    )
    return variants if has_one else None if number is None else number * variants


def _checkpoints(facts: RunFacts) -> DiskNeed:
    checkpoint, steps = facts.run.checkpoint, facts.num_steps
    interval, limit = checkpoint.checkpoint_step_interval, checkpoint.checkpoints_total_limit
    made = 1 if not interval or steps is None else -(-steps // interval)
    # The oldest one goes when the newest is there.
    kept = made if limit is None else min(made, limit + 1)
    memory = facts.step_memory
    weights = memory.weights if facts.run.model.is_full else memory.adapter
    state = weights + memory.states + memory.ema
    return _missing("checkpoints", checkpoint.output_dir, kept * state + weights + memory.ema)


def _missing(name: str, folder: Path, num_bytes: int) -> DiskNeed:
    """What is to be written of something that may be there in part."""
    return DiskNeed(name, folder, num_bytes - folder_bytes(folder))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.parents) if os.path.exists(each))

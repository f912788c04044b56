"""What the estimate reads of a run: its denoiser's layers, its sizes, its images. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes
from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.resolution import nearest_multiple, square_size
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec, Size
from simpletuner.helpers.data.sources.opening import open_source
from simpletuner.helpers.estimating.adapter_memory import adapter_of
from simpletuner.helpers.estimating.step_memory import RunMemory, TrainingSetup, run_memory
from simpletuner.helpers.models.component_memory import FLOAT32, VAE_WEIGHTS, TextEncoder
from simpletuner.helpers.models.memory_model import Arithmetic, FamilyMemory, Layout, LowRank, Step
from simpletuner.helpers.models.registry import memory_of
from simpletuner.helpers.models.weights_on_disk import num_weights_in

WIDE_ASPECT = 1.5
"""Width over height of photographs, where a resolution is the shorter edge."""


@dataclass(frozen=True)
class RunFacts:
    """A run and its family, with what follows from both."""

    run: RunConfig
    spec: ModelSpec
    memory: FamilyMemory
    _layouts: dict[Size, Layout] = field(default_factory=dict)

    @cached_property
    def flavour(self) -> str:
        """The published model whose sizes stand for what is not on this machine."""
        model = self.run.model
        named = model.model_flavour or self.spec.flavour_of(model.pretrained_model_name_or_path)
        return named or self.spec.default_flavour

    @cached_property
    def denoiser(self) -> Mapping[str, Any]:
        """Configuration of the denoiser: the published one, with the values of a local model."""
        return {**self.memory.PUBLISHED[self.flavour], **(_local_config(self.run, self.spec) or {})}

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder or a file on this machine."""
        return Path(self.run.model.pretrained_model_name_or_path).exists()

    @cached_property
    def text_tokens(self) -> int:
        """Tokens of a prompt."""
        return self.memory.TEXT_TOKENS[self.flavour] * (self.run.model.max_token_length // 75)

    @cached_property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """The text encoders: the published ones, of a folder on this machine with its numbers of weights."""
        published = self.memory.TEXT_ENCODERS[self.flavour]
        return tuple(
            _with_weights(
                each, self._num_local_weights(f"text_encoder_{number}" if number > 1 else "text_encoder")
            )
            for number, each in enumerate(published, start=1)
        )

    @cached_property
    def vae_bytes(self) -> int:
        """Bytes of the VAE, in float32."""
        return FLOAT32 * (self._num_local_weights("vae") or VAE_WEIGHTS)

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """Formats of the run on a GPU."""
        return Arithmetic(is_mixed=self.run.precision.mixed_precision != "no", is_gpu=True)

    @cached_property
    def adapter(self) -> LowRank | None:
        """The adapter; None if the whole model is trained."""
        if self.run.model.is_full:
            return None
        layout, paths = self.layout(Size(height=64, width=64)), self.memory.BLOCK_PATHS
        return adapter_of(self.run, self.spec, layout=layout, paths=paths)

    @cached_property
    def training_size(self) -> Size:
        """Size of the largest images that are trained."""
        sizes = [self.size_of(each) for each in self.run.datasets]
        return max(sizes, key=lambda size: size.height * size.width)

    @cached_property
    def validation_size(self) -> Size | None:
        """Size of the largest validation images; None without any."""
        validation = self.run.validation
        if validation.validation_disable or not validation.prompts:
            return None
        sizes = validation.validation_resolution or (self.training_size,)
        return max(sizes, key=lambda size: size.height * size.width)

    def layout(self, size: Size) -> Layout:
        """The denoiser on images of a size, with as many references of the same size as a run has at once."""
        if size not in self._layouts:
            seen = Size(height=size.height * (1 + self.num_references), width=size.width)
            self._layouts[size] = self.memory.layout(self.denoiser, size=seen, text_tokens=self.text_tokens)
        return self._layouts[size]

    @property
    def num_references(self) -> int:
        """Reference images of one image."""
        run = self.run
        if not run.has_references:
            return 0
        if run.data.conditioning_multidataset_sampling == "random":
            return 1
        ids = {each.id for each in run.references}
        return max(
            len(each.conditioning) + len(ids.intersection(each.conditioning_data)) for each in run.datasets
        )

    @property
    def largest_batch(self) -> int:
        """Images of the largest batch."""
        default = self.run.training.train_batch_size
        return max(each.train_batch_size or default for each in self.run.datasets)

    def step(self, batch_size: int, *, interval: int) -> Step:
        """A step of training that recomputes every which block; 0 for none, as in a forward pass."""
        return Step(
            arithmetic=self.arithmetic,
            batch_size=batch_size,
            adapter=self.adapter,
            checkpointing_interval=interval,
        )

    @cached_property
    def setup(self) -> TrainingSetup:
        """What decides over the memory of a training step."""
        run, training = self.run, self.run.training
        interval = (training.gradient_checkpointing_interval or 1) if training.gradient_checkpointing else 0
        return TrainingSetup(
            layout=self.layout(self.training_size),
            step=self.step(self.largest_batch, interval=interval),
            optimizer=run.optimizer,
            precision=run.precision.base_model_precision,
            has_ema=run.ema.use_ema,
            steps_in_backward=run.model.is_full and run.whole_model.fused_backward_pass,
            layer_filter=run.whole_model.layer_filter if run.model.is_full else (),
        )

    @cached_property
    def step_memory(self) -> RunMemory:
        """The parts of a training step, without what is beside the denoiser."""
        return run_memory(self.setup)

    @cached_property
    def images(self) -> Mapping[str, int | None]:
        """Id of a dataset -> its images; None where they are no files in a folder on this machine."""
        return {each.id: count_images(each) for each in self.run.datasets}

    @property
    def num_images(self) -> int | None:
        """Images of all datasets; None if some cannot be counted."""
        numbers = list(self.images.values())
        return None if None in numbers else sum(number or 0 for number in numbers)

    @cached_property
    def num_steps(self) -> int | None:
        """Optimiser steps of the run; None if they depend on images that cannot be counted."""
        training = self.run.training
        if training.max_train_steps is not None or self.num_images is None:
            return training.max_train_steps
        batches = sum(self._batches(each) for each in self.run.datasets if each.is_trained)
        return ceil(batches * training.num_train_epochs / training.gradient_accumulation_steps)

    def _batches(self, dataset: DatasetConfig) -> int:
        """About the batches of a dataset in an epoch."""
        draws = (self.images[dataset.id] or 0) * (1 + dataset.repeats) * dataset.probability
        return ceil(draws / (dataset.train_batch_size or self.run.training.train_batch_size))

    def _num_local_weights(self, component: str) -> int | None:
        return num_weights_in(Path(self.run.model.pretrained_model_name_or_path) / component)

    def size_of(self, dataset: DatasetConfig) -> Size:
        """Size of a dataset's images; of those with another aspect the area is about the same."""
        square = square_size(
            resolution=dataset.resolution,
            resolution_type=dataset.resolution_type,
            alignment=(alignment := self.run.data.alignment(self.spec.pixel_alignment)),
        )
        if dataset.resolution_type != "pixel" or (dataset.crop and dataset.crop_aspect == "square"):
            return square
        return Size(height=square.height, width=nearest_multiple(square.width * WIDE_ASPECT, alignment))


def facts_of(run: RunConfig, spec: ModelSpec) -> RunFacts | None:
    """What the estimate reads of a run; None without a memory model that fits its denoiser."""
    memory = memory_of(spec.name)
    if memory is None:
        return None
    facts = RunFacts(run, spec, memory)
    return facts if _local_config(run, spec) is None or _is_of_the_family(facts) else None


def _is_of_the_family(facts: RunFacts) -> bool:
    """Whether the layers follow from the denoiser's config.json; the run itself names what is wrong there."""
    try:
        facts.layout(Size(height=64, width=64))
        int(facts.denoiser[facts.memory.TEXT_WIDTH_KEY])
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError):
        return False
    return True


def count_images(dataset: DatasetConfig) -> int | None:
    """Images in a dataset's folder by their names; None if they are not in a folder on this machine."""
    if not IMAGE_SOURCES[dataset.source].needs_folder:
        return None
    suffixes = tuple(image_suffixes())
    number = sum(
        name.lower().endswith(suffixes) and conditioned_stem(name) is None
        for name, _ in open_source(dataset).list()
    )
    return number if dataset.max_num_samples is None else min(number, dataset.max_num_samples)


def _with_weights(encoder: TextEncoder, num_weights: int | None) -> TextEncoder:
    if num_weights is None:
        return encoder
    kept = encoder.kept_weights * num_weights // encoder.num_weights
    return replace(encoder, num_weights=num_weights, kept_weights=kept)


def _local_config(run: RunConfig, spec: ModelSpec) -> Mapping[str, Any] | None:
    """config.json of a denoiser on this machine; None if there is none, or it cannot be read."""
    model = run.model
    swapped = model.pretrained_unet_model_name_or_path or model.pretrained_transformer_model_name_or_path
    source = Path(swapped or model.pretrained_model_name_or_path)
    subfolder = model.pretrained_unet_subfolder or model.pretrained_transformer_subfolder
    for folder in (source / (subfolder or spec.denoiser_name), source):
        try:
            content = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return content
    return None

"""The adapter of another run, shown beside this run's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.inference import (
    PEFT_NAME,
    load_into_pipeline,
    load_peft_into_pipeline,
    remove_from_pipeline,
)
from simpletuner.helpers.checkpointing.fingerprint import weight_hashes
from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.training.trainer import ADAPTER_FILE

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.sampling.prompts import PromptSpec
    from simpletuner.helpers.sampling.validation_sampler import ValidationSampler


def build_comparison(config: RunConfig, sampler: ValidationSampler) -> Comparison | None:
    """What a run's pictures are compared with; None if nothing, or if it makes no pictures.

    Raises:
        TrainingError: The other run's adapter is not there.
    """
    other = config.compared_with
    if other is None or not sampler.shots:
        return None
    adapter = other.checkpoint.output_dir / ADAPTER_FILE
    try:
        digest = xxhash.xxh3_64_hexdigest(adapter.read_bytes())
    except OSError as error:
        raise TrainingError(
            f"{adapter}: the adapter of validation_compared_config {other.source} cannot be read "
            f"({error.strerror}). Copy it from that run's last checkpoint, or train it in another output_dir."
        ) from error
    name = other.algorithm.title
    title = name if name != config.algorithm.title else f"{name} of {other.checkpoint.output_dir.name}"
    return Comparison(title=title, adapter=adapter, digest=digest, sampler=sampler)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The pictures of another run's adapter, made once, before this run's adapter is attached."""

    title: str
    """What their column is called."""
    adapter: Path
    """Its file."""
    digest: str
    """Of that file's content."""
    sampler: ValidationSampler

    def picture(self, shot: PromptSpec) -> Path:
        """Where the other adapter's picture of a shot lies once it is made."""
        return self.sampler.cached_path(shot, self.digest, shot.strength)

    def generate_missing(self, denoiser: nn.Module) -> None:
        """Make the pictures that are not on disk yet with a denoiser that carries no adapter.

        Raises:
            TrainingError: The denoiser is not what it was before.
        """
        missing = {shot: file for shot in self.sampler.shots if not (file := self.picture(shot)).exists()}
        if not missing:
            return
        before = weight_hashes(denoiser)

        def make() -> None:
            with self.sampler.sampling(denoiser):
                pipeline = self.sampler.make_pipeline(denoiser)
                with loaded_adapter(pipeline, self.adapter) as set_strength:
                    for shot, file in missing.items():
                        set_strength(shot.strength)
                        self.sampler.make(pipeline, shot, file)

        self.sampler.best_effort(f"the pictures of {self.adapter}", make)
        if weight_hashes(denoiser) != before:
            raise TrainingError(
                f"{self.adapter} left traces in the model after its pictures were made. Start again with "
                "another validation_compared_config, or without one."
            )


@contextmanager
def loaded_adapter(pipeline: Any, file: Path) -> Iterator[Callable[[float], None]]:
    """A pipeline with the adapter of a file, of whatever kind; yields what sets its strength.

    Raises:
        AdapterError: The file cannot be read or does not fit.
    """
    if adapter_file.read(file).is_peft:
        load_peft_into_pipeline(pipeline, file)
        try:
            yield lambda strength: pipeline.set_adapters(PEFT_NAME, strength)
        finally:
            pipeline.unload_lora_weights()
    else:
        adapter = load_into_pipeline(pipeline, file)
        try:
            yield adapter.set_strength
        finally:
            remove_from_pipeline(pipeline, adapter)

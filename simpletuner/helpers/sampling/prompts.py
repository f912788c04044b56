"""The prompts of a validation, with size, seed, adapter strength and reference images of each image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import image_name

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.contracts import PipelineType, Size, TextEmbeds
    from simpletuner.helpers.models.family import ModelFamily


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference image as the model sees it."""

    name: str
    """Of its file."""
    digest: str
    """Changes with the file and the cut."""
    pixels: Tensor = field(compare=False, repr=False)
    """[3, H, W] float32 in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """A prompt and the settings of its image."""

    name: str
    """Unique within the validation; names the image file, without suffix."""
    text: str
    strength: float
    """Adapter strength: 1 as trained, 0 the base model."""
    size: Size
    seed: int
    reference_files: tuple[Path, ...] = ()
    references: tuple[Reference, ...] = ()
    """Their pixels, once they are read."""

    @property
    def reference_names(self) -> list[str]:
        """Names of the files of its reference images, redacted."""
        return [redacted(file.name) for file in self.reference_files]

    @property
    def label(self) -> str:
        """Label of the image in a grid."""
        strength = "" if self.strength == 1 else f"  strength {self.strength:g}"
        return self._label(strength)

    @property
    def label_of_row(self) -> str:
        """The label where the columns say the strength."""
        return self._label("")

    def _label(self, strength: str) -> str:
        names = ", ".join(self.reference_names)
        of = f"\nof {names}" if names else ""
        return f"{redacted(self.text)}\n{self.size}  seed {self.seed}{strength}{of}"


def expand_prompts(
    config: ValidationConfig, *, seed: int, seeds: Sequence[int] = ()
) -> tuple[PromptSpec, ...]:
    """Every prompt at every size, `num_validation_images` times with consecutive seeds; none when disabled.

    `seed` is the run's; it applies when validation_seed is unset. `seeds` are first seeds in place of both.
    """
    if config.validation_disable:
        return ()
    firsts = seeds or [seed if config.validation_seed is None else config.validation_seed]
    number = config.num_validation_images
    every_seed = dict.fromkeys(first + index for first in firsts for index in range(number))
    return tuple(
        PromptSpec(
            name=image_name(index, prompt.name, size=size, seed=image_seed),
            text=prompt.text,
            strength=config.validation_lycoris_strength if prompt.strength is None else prompt.strength,
            size=size,
            seed=image_seed,
            reference_files=prompt.images,
        )
        for index, prompt in enumerate(config.prompts)
        for size in config.validation_resolution
        for image_seed in every_seed
    )


def pipeline_inputs(
    family: ModelFamily, prompt: PromptSpec, *, texts: tuple[TextEmbeds, TextEmbeds], config: ValidationConfig
) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call; `texts` embed the prompt and the negative prompt."""
    # Families that take no references have no such argument.
    pixels = [each.pixels for each in prompt.references]
    references: dict[str, Any] = {"references": pixels} if pixels else {}
    return {
        **family.pipeline_inputs(*texts, validation=config, size=prompt.size, **references),
        **call_options(prompt, config),
    }


def pipeline_type(prompts: Iterable[PromptSpec]) -> PipelineType:
    """The pipeline that generates the images of all prompts."""
    return "edit" if any(prompt.references for prompt in prompts) else "text2image"


def call_options(prompt: PromptSpec, config: ValidationConfig) -> dict[str, Any]:
    """Keyword arguments of a pipeline call that are the same for every family."""
    return {
        "height": prompt.size.height,
        "width": prompt.size.width,
        "num_inference_steps": config.validation_num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(prompt.seed),
    }

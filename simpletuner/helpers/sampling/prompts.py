"""The prompts of a validation, with size, seed and adapter strength of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import image_name

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.contracts import Size


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

    @property
    def label(self) -> str:
        """Label of the image in a grid."""
        strength = "" if self.strength == 1 else f"  strength {self.strength:g}"
        return f"{redacted(self.text)}\n{self.size}  seed {self.seed}{strength}"


def expand_prompts(config: ValidationConfig, *, seed: int) -> tuple[PromptSpec, ...]:
    """Every prompt at every size, `num_validation_images` times with consecutive seeds; none when disabled.

    `seed` is the run's; it applies when validation_seed is unset.
    """
    if config.validation_disable:
        return ()
    first_seed = seed if config.validation_seed is None else config.validation_seed
    return tuple(
        PromptSpec(
            name=image_name(index, prompt.name, size=size, seed=image_seed),
            text=prompt.text,
            strength=config.validation_lycoris_strength if prompt.strength is None else prompt.strength,
            size=size,
            seed=image_seed,
        )
        for index, prompt in enumerate(config.prompts)
        for size in config.validation_resolution
        for image_seed in range(first_seed, first_seed + config.num_validation_images)
    )


def call_options(prompt: PromptSpec, config: ValidationConfig) -> dict[str, Any]:
    """Keyword arguments of a pipeline call that are the same for every family."""
    return {
        "height": prompt.size.height,
        "width": prompt.size.width,
        "num_inference_steps": config.validation_num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(prompt.seed),
    }

"""The parts of one Flux.1 model: where each lies, and whether they belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.helpers.models.component_checks import (
    base_source,
    check_classes,
    check_number,
    number,
    read_index,
    transformer_of,
    vae_of,
)
from simpletuner.helpers.models.flux.spec import FLAVOURS
from simpletuner.helpers.models.loading import (
    Component,
    ModelSource,
    find_component,
    guess_subfolder,
)

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ModelConfig

PIPELINES = ("FluxPipeline",)
PATCH = 2
"""Latent positions along the edge of a token."""


@dataclass(frozen=True, slots=True)
class FluxParts:
    """Every component of a Flux.1 model."""

    transformer: Component
    vae: Component
    text_encoder: Component
    text_encoder_2: Component
    tokenizer: Component
    tokenizer_2: Component
    scheduler: Component
    text_tokens: int
    """Length that T5 captions are padded and cut to."""

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer is told a guidance scale."""
        return self.transformer.config.get("guidance_embeds") is True


def find_parts(model: ModelConfig) -> FluxParts:
    """Find every component, downloading what is not here, and check that they are Flux.1's and fit together.

    Raises:
        ModelError: A component is missing or of another architecture, or the repository cannot be reached.
    """
    base = base_source(model)
    read_index(base, pipelines=PIPELINES, family="Flux.1")
    transformer = transformer_of(model, base)
    parts = FluxParts(
        transformer=transformer,
        vae=vae_of(model, base),
        text_encoder=find_component("text_encoder", base, kind="transformers"),
        text_encoder_2=_t5(model, base),
        tokenizer=find_component("tokenizer", base, kind="tokenizer"),
        tokenizer_2=find_component("tokenizer_2", base, kind="tokenizer"),
        scheduler=find_component("scheduler", base, kind="scheduler"),
        text_tokens=_text_tokens(model, transformer),
    )
    check_classes(
        {
            "FluxTransformer2DModel": parts.transformer,
            "AutoencoderKL": parts.vae,
            "CLIPTextModel": parts.text_encoder,
            "T5EncoderModel": parts.text_encoder_2,
        },
        family="Flux.1",
    )
    packed = number(parts.vae, "latent_channels") * PATCH**2
    widths = {
        "in_channels": (packed, "width of a token of 2 x 2 latents"),
        "joint_attention_dim": (number(parts.text_encoder_2, "d_model"), "width of the T5 text encoder"),
        "pooled_projection_dim": (
            number(parts.text_encoder, "hidden_size"),
            "width of the CLIP text encoder",
        ),
    }
    for name, (needed, what) in widths.items():
        check_number(parts.transformer, name, needed=needed, what=what)
    return parts


def _t5(model: ModelConfig, base: ModelSource) -> Component:
    where = model.pretrained_t5_model_name_or_path
    if where is None:
        return find_component("text_encoder_2", base, kind="transformers")
    source = ModelSource(where, key="pretrained_t5_model_name_or_path")
    subfolder = guess_subfolder(source, usual="text_encoder_2")
    return find_component("text_encoder_2", source, kind="transformers", subfolder=subfolder)


def _text_tokens(model: ModelConfig, transformer: Component) -> int:
    """Of the flavour that the user names, else of one like the transformer."""
    flavour = FLAVOURS.get(str(model.model_flavour))
    if flavour is None:
        has_guidance = transformer.config.get("guidance_embeds") is True
        flavour = next(each for each in FLAVOURS.values() if each.has_guidance == has_guidance)
    return flavour.text_tokens

"""Finds the components of a Flux.1 model and checks that they fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.helpers.models.component_checks import (
    ModelComponents,
    base_source,
    check_classes,
    check_fit,
    config_number,
    read_index,
    transformer_of,
    vae_of,
)
from simpletuner.helpers.models.flux.spec import FLAVOURS
from simpletuner.helpers.models.flux.tokens import PATCH
from simpletuner.helpers.models.loading import (
    Component,
    ModelSource,
    find_component,
    guess_subfolder,
)

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.model import ModelConfig

PIPELINES = ("FluxPipeline", "FluxKontextPipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxComponents(ModelComponents):
    """Components of a Flux.1 model; the denoiser is a transformer."""

    text_encoder: Component
    text_encoder_2: Component
    tokenizer: Component
    tokenizer_2: Component
    text_tokens: int
    """T5 tokens of a prompt, after padding and truncation."""

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer has a guidance embedding."""
        return self.denoiser.config.get("guidance_embeds") is True


def find_components(model: ModelConfig) -> FluxComponents:
    """Find every component, downloading missing files, and check that they are Flux.1's and fit together.

    Raises:
        ModelError: A component is missing or of another architecture, or the repository is unreachable.
    """
    base = base_source(model)
    read_index(base, pipelines=PIPELINES, family="Flux.1")
    transformer = transformer_of(model, base)
    components = FluxComponents(
        denoiser=transformer,
        vae=vae_of(model, base),
        text_encoder=find_component("text_encoder", base, component_type="transformers"),
        text_encoder_2=_t5(model, base),
        tokenizer=find_component("tokenizer", base, component_type="tokenizer"),
        tokenizer_2=find_component("tokenizer_2", base, component_type="tokenizer"),
        scheduler=find_component("scheduler", base, component_type="scheduler"),
        text_tokens=_text_tokens(model, transformer),
    )
    check_classes(
        {
            "FluxTransformer2DModel": transformer,
            "AutoencoderKL": components.vae,
            "CLIPTextModel": components.text_encoder,
            "T5EncoderModel": components.text_encoder_2,
        },
        family="Flux.1",
    )
    token_width = config_number(components.vae, "latent_channels") * PATCH**2
    t5_width = config_number(components.text_encoder_2, "d_model")
    clip_width = config_number(components.text_encoder, "hidden_size")
    check_fit(
        transformer,
        {
            "in_channels": (token_width, "width of a token of 2 x 2 latents"),
            "joint_attention_dim": (t5_width, "width of the T5 text encoder"),
            "pooled_projection_dim": (clip_width, "width of the CLIP text encoder"),
        },
    )
    return components


def _t5(model: ModelConfig, base: ModelSource) -> Component:
    where = model.pretrained_t5_model_name_or_path
    if where is None:
        return find_component("text_encoder_2", base, component_type="transformers")
    source = ModelSource(where, key="pretrained_t5_model_name_or_path")
    subfolder = guess_subfolder(source, usual="text_encoder_2")
    return find_component("text_encoder_2", source, component_type="transformers", subfolder=subfolder)


def _text_tokens(model: ModelConfig, transformer: Component) -> int:
    """Tokens of the configured flavour, else of a flavour with the same guidance embedding."""
    flavour = FLAVOURS.get(str(model.model_flavour))
    if flavour is None:
        has_guidance = transformer.config.get("guidance_embeds") is True
        flavour = next(each for each in FLAVOURS.values() if each.has_guidance == has_guidance)
    return flavour.text_tokens

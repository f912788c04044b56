"""Finds the components of a Flux.2 model and checks that they fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers import Mistral3ForConditionalGeneration, PreTrainedModel, Qwen3ForCausalLM

from simpletuner.helpers.contracts import PipelineType
from simpletuner.helpers.errors import ModelError
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
from simpletuner.helpers.models.flux2.editing import Flux2EditPipeline, Flux2KleinEditPipeline
from simpletuner.helpers.models.flux2.latents import PATCH
from simpletuner.helpers.models.flux2.pipeline import (
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
)
from simpletuner.helpers.models.flux2.spec import FLAVOURS
from simpletuner.helpers.models.loading import Component, class_of, find_component

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Flux2Variant:
    """Pipelines and text encoder of dev or Klein."""

    name: str
    pipelines: Mapping[PipelineType, type[DiffusionPipeline]]
    """The text2image pipeline takes reference images as arguments, so it serves image2image too."""
    text_encoder: type[PreTrainedModel]
    hidden_states: tuple[int, ...]
    """Hidden states of the text encoder that the pipeline concatenates; 0 is the state before any layer."""
    conversations: Callable[[list[str]], list[list[dict[str, Any]]]]
    """Prompts -> conversations for the chat template, as the pipeline makes them."""
    chat_options: Mapping[str, bool]
    """Further arguments of the chat template, as the pipeline passes them."""


DEV = Flux2Variant(
    name="Flux.2 dev",
    pipelines={"text2image": Flux2Pipeline, "image2image": Flux2Pipeline, "edit": Flux2EditPipeline},
    text_encoder=Mistral3ForConditionalGeneration,
    hidden_states=(10, 20, 30),
    conversations=format_input,
    chat_options={"add_generation_prompt": False},
)
KLEIN = Flux2Variant(
    name="Flux.2 Klein",
    pipelines={
        "text2image": Flux2KleinPipeline,
        "image2image": Flux2KleinPipeline,
        "inpaint": Flux2KleinInpaintPipeline,
        "edit": Flux2KleinEditPipeline,
    },
    text_encoder=Qwen3ForCausalLM,
    hidden_states=(9, 18, 27),
    conversations=lambda prompts: [[{"role": "user", "content": prompt}] for prompt in prompts],
    chat_options={"add_generation_prompt": True, "enable_thinking": False},
)
VARIANTS = {variant.pipelines["text2image"].__name__: variant for variant in (DEV, KLEIN)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flux2Components(ModelComponents):
    """Components of a Flux.2 model; the denoiser is a transformer."""

    variant: Flux2Variant
    text_encoder: Component
    tokenizer: Component
    is_distilled: bool
    """Whether the model samples in a few steps without guidance."""

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer has a guidance embedding; older configurations with one lack the key."""
        return self.denoiser.config.get("guidance_embeds", True) is True


def find_components(model: ModelConfig) -> Flux2Components:
    """Find every component, downloading missing files, and check that they are Flux.2's and fit together.

    Raises:
        ModelError: A component is missing or of another architecture, or the repository is unreachable.
    """
    base = base_source(model)
    index = read_index(base, pipelines=tuple(VARIANTS), family="Flux.2")
    variant = VARIANTS[class_of(index)]
    flavour = FLAVOURS.get(str(model.model_flavour))
    if flavour is not None and flavour.has_guidance is not (variant is DEV):
        raise ModelError(
            f"{base} is {variant.name}, but model_flavour is {model.model_flavour}. "
            "Correct model_flavour, or remove it."
        )
    components = Flux2Components(
        variant=variant,
        denoiser=transformer_of(model, base),
        vae=vae_of(model, base),
        text_encoder=find_component("text_encoder", base, component_type="transformers"),
        tokenizer=find_component("tokenizer", base, component_type="tokenizer"),
        scheduler=find_component("scheduler", base, component_type="scheduler"),
        is_distilled=index.get("is_distilled") is True,
    )
    check_classes(
        {
            "Flux2Transformer2DModel": components.denoiser,
            "AutoencoderKLFlux2": components.vae,
            variant.text_encoder.__name__: components.text_encoder,
        },
        family=variant.name,
    )
    _check_fit(components)
    return components


def _check_fit(components: Flux2Components) -> None:
    variant, encoder = components.variant, components.text_encoder
    # A model of images and text has a section of its own for the text encoder.
    hidden_size = config_number(encoder, "hidden_size", section="text_config")
    num_layers = config_number(encoder, "num_hidden_layers", section="text_config")
    num_states = len(variant.hidden_states)
    token_width = config_number(components.vae, "latent_channels") * PATCH**2
    check_fit(
        components.denoiser,
        {
            "in_channels": (token_width, "width of a token of 2 x 2 latents"),
            "joint_attention_dim": (num_states * hidden_size, f"width of {num_states} text encoder states"),
        },
    )
    if num_layers < max(variant.hidden_states):
        raise ModelError(
            f"{encoder.source}: {encoder.folder} has {num_layers} layers, but {variant.name} needs the state "
            f"after layer {max(variant.hidden_states)}. Give a complete {variant.name} model."
        )

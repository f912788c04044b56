"""The parts of one Flux.2 model: where each lies, and whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers import Mistral3ForConditionalGeneration, PreTrainedModel, Qwen3ForCausalLM

from simpletuner.helpers.contracts import PipelineKind
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.component_checks import (
    base_source,
    check_classes,
    check_number,
    number,
    read_index,
    transformer_of,
    vae_of,
)
from simpletuner.helpers.models.flux2.latents import PATCH
from simpletuner.helpers.models.flux2.pipeline import (
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
)
from simpletuner.helpers.models.flux2.spec import FLAVOURS
from simpletuner.helpers.models.loading import Component, class_of, find_component

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ModelConfig


@dataclass(frozen=True, slots=True)
class Flux2Kind:
    """What dev and Klein each do in their own way."""

    name: str
    pipelines: Mapping[PipelineKind, type[DiffusionPipeline]]
    """Reference images are arguments of the first, which therefore starts from images too."""
    text_encoder: type[PreTrainedModel]
    text_states: tuple[int, ...]
    """Which hidden states of the text encoder its pipeline joins to one embedding; 0 is before any layer."""
    conversations: Callable[[list[str]], list[list[dict[str, Any]]]]
    """Captions -> what its pipeline gives to the chat template."""
    chat_options: Mapping[str, bool]
    """What its pipeline gives to the chat template beside."""


DEV = Flux2Kind(
    name="Flux.2 dev",
    pipelines={"text2image": Flux2Pipeline, "image2image": Flux2Pipeline},
    text_encoder=Mistral3ForConditionalGeneration,
    text_states=(10, 20, 30),
    conversations=format_input,
    chat_options={"add_generation_prompt": False},
)
KLEIN = Flux2Kind(
    name="Flux.2 Klein",
    pipelines={
        "text2image": Flux2KleinPipeline,
        "image2image": Flux2KleinPipeline,
        "inpaint": Flux2KleinInpaintPipeline,
    },
    text_encoder=Qwen3ForCausalLM,
    text_states=(9, 18, 27),
    conversations=lambda prompts: [[{"role": "user", "content": prompt}] for prompt in prompts],
    chat_options={"add_generation_prompt": True, "enable_thinking": False},
)
KINDS = {kind.pipelines["text2image"].__name__: kind for kind in (DEV, KLEIN)}


@dataclass(frozen=True, slots=True)
class Flux2Parts:
    """Every component of a Flux.2 model."""

    kind: Flux2Kind
    transformer: Component
    vae: Component
    text_encoder: Component
    tokenizer: Component
    scheduler: Component
    is_distilled: bool
    """Whether it was trained to make pictures in a few steps without guidance."""

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer is told a guidance scale; a configuration older than the key means yes."""
        return self.transformer.config.get("guidance_embeds", True) is True


def find_parts(model: ModelConfig) -> Flux2Parts:
    """Find every component, downloading what is not here, and check that they are Flux.2's and fit together.

    Raises:
        ModelError: A component is missing or of another architecture, or the repository cannot be reached.
    """
    base = base_source(model)
    index = read_index(base, pipelines=tuple(KINDS), family="Flux.2")
    kind = KINDS[class_of(index)]
    flavour = FLAVOURS.get(str(model.model_flavour))
    if flavour is not None and flavour.has_guidance is not (kind is DEV):
        raise ModelError(
            f"{base}: is {kind.name}, and model_flavour says {model.model_flavour}. "
            "Correct model_flavour, or leave it out."
        )
    parts = Flux2Parts(
        kind=kind,
        transformer=transformer_of(model, base),
        vae=vae_of(model, base),
        text_encoder=find_component("text_encoder", base, kind="transformers"),
        tokenizer=find_component("tokenizer", base, kind="tokenizer"),
        scheduler=find_component("scheduler", base, kind="scheduler"),
        is_distilled=index.get("is_distilled") is True,
    )
    check_classes(
        {
            "Flux2Transformer2DModel": parts.transformer,
            "AutoencoderKLFlux2": parts.vae,
            kind.text_encoder.__name__: parts.text_encoder,
        },
        family=kind.name,
    )
    _check_fit(parts)
    return parts


def _check_fit(parts: Flux2Parts) -> None:
    kind, transformer = parts.kind, parts.transformer
    packed = number(parts.vae, "latent_channels") * PATCH**2
    check_number(transformer, "in_channels", needed=packed, what="width of a token of 2 x 2 latents")
    width = len(kind.text_states) * _text_number(parts.text_encoder, "hidden_size")
    what = f"width of {len(kind.text_states)} states of the text encoder"
    check_number(transformer, "joint_attention_dim", needed=width, what=what)
    layers = _text_number(parts.text_encoder, "num_hidden_layers")
    if layers < max(kind.text_states):
        raise ModelError(
            f"{parts.text_encoder.source}: {parts.text_encoder.folder} has {layers} layers, and {kind.name} "
            f"reads the state after layer {max(kind.text_states)}. Give a complete {kind.name} model."
        )


def _text_number(component: Component, name: str) -> int:
    """A number of the part that reads text; in a model of images and text it has a section of its own."""
    section = component.config.get("text_config", component.config)
    value = section.get(name) if isinstance(section, Mapping) else None
    if not isinstance(value, int):
        raise ModelError(
            f"{component.source}: {component.folder} has no number for {name} (found {value!r}). "
            "Give a complete model."
        )
    return value

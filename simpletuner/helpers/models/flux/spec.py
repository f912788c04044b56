"""Spec of Flux.1. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simpletuner.helpers.contracts import Licence, ModelLabels, ModelSpec, TargetAlias
from simpletuner.helpers.models.flux.key_names import original_name
from simpletuner.helpers.models.key_groups import (
    FLOW_KEYS,
    GUIDANCE_KEYS,
    TRANSFORMER_KEYS,
    Flavour,
    unreadable_single_file,
    unused_guidance_keys,
)
from simpletuner.helpers.models.shift import shift_by_tokens


@dataclass(frozen=True, slots=True)
class FluxFlavour(Flavour):
    """One published Flux.1."""

    text_tokens: int
    """T5 tokens of a prompt, after padding and truncation."""


FLAVOURS: Mapping[str, FluxFlavour] = {
    "dev": FluxFlavour("black-forest-labs/FLUX.1-dev", has_guidance=True, text_tokens=512),
    "krea": FluxFlavour("black-forest-labs/FLUX.1-Krea-dev", has_guidance=True, text_tokens=512),
    "kontext": FluxFlavour("black-forest-labs/FLUX.1-Kontext-dev", has_guidance=True, text_tokens=512),
    "schnell": FluxFlavour("black-forest-labs/FLUX.1-schnell", has_guidance=False, text_tokens=256),
}

_NON_COMMERCIAL = {
    name: Licence(
        "other",
        "flux-1-dev-non-commercial-license",
        f"https://huggingface.co/{FLAVOURS[name].repository}/blob/main/LICENSE.md",
    )
    for name in ("dev", "krea", "kontext")
}
# Models that others made of Flux.1 are of dev's architecture, but for those of schnell, which say so.
_LABELS = dict.fromkeys(("dev", "krea", "kontext", ""), ModelLabels("flux-1-dev", "flux1"))

_CONTEXT = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
_IMAGE = ("to_k", "to_q", "to_v", "to_out.0")
_CONTEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *_CONTEXT_FEED_FORWARD, "proj_mlp", "proj_out")


def problems(values: Mapping[str, object]) -> Mapping[str, str]:
    """Checks of Flux.1's keys: maps settings to {key: error message}."""
    found = unused_guidance_keys(values, FLAVOURS, instead="another flavour")
    found |= unreadable_single_file(values, "pretrained_t5_model_name_or_path", component="a text encoder")
    real = values.get("validation_guidance_real", 1.0)
    if values.get("flux_attention_masked_training") and isinstance(real, float) and real > 1:
        found["validation_guidance_real"] = (
            f"{real:g} does not work with flux_attention_masked_training: the pipeline uses the mask of the "
            "prompt for the negative prompt too. Set one of them to its default."
        )
    return found


_IN_BLOCKS = (
    *("AdaLayerNormContinuous", "AdaLayerNormZero", "AdaLayerNormZeroSingle", "FeedForward", "FluxAttention"),
    *("FluxSingleTransformerBlock", "FluxTransformerBlock", "GELU", "ModuleList"),
)
_TIME_AND_GUIDANCE, _TIME = "CombinedTimestepGuidanceTextProjEmbeddings", "CombinedTimestepTextProjEmbeddings"
LAYER_SIDES: dict[str, int] = {
    **dict.fromkeys(_IN_BLOCKS, 3072),
    **dict.fromkeys(("FluxTransformer2DModel", "Linear"), 64),
    "PixArtAlphaTextProjection": 768,
    "TimestepEmbedding": 256,
}

SPEC = ModelSpec(
    name="flux",
    flavours={name: flavour.repository for name, flavour in FLAVOURS.items()},
    default_flavour="dev",
    prediction_types=("flow_matching",),
    pixel_alignment=64,
    minimum_alignment=16,
    default_resolution=1024,
    lora_targets=(*_IMAGE, *_CONTEXT),
    slider_targets=_IMAGE,
    denoiser_name="transformer",
    own_keys=FLOW_KEYS
    | GUIDANCE_KEYS
    | TRANSFORMER_KEYS
    | {
        "flux_attention_masked_training",
        "flux_lora_target",
        "pretrained_t5_model_name_or_path",
        "validation_guidance_real",
    },
    default_guidance=3.5,
    num_text_encoders=2,
    problems=problems,
    lora_presets={
        "all": (*_IMAGE, *_CONTEXT),
        "all+ffs": (*_IMAGE, *_CONTEXT, *_FEED_FORWARD),
        "context": _CONTEXT,
        "context+ffs": (*_CONTEXT, *_CONTEXT_FEED_FORWARD),
        "mmdit": _IMAGE,
        "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
        "nano": ("single_transformer_blocks.7.proj_out",),
    },
    lora_preset_key="flux_lora_target",
    target_aliases={
        "Attention": TargetAlias(modules=("FluxAttention",)),
        "FeedForward": TargetAlias(
            modules=("FeedForward",),
            names=(
                r"single_transformer_blocks\.\d+\.proj_mlp$",
                r"single_transformer_blocks\.\d+\.proj_out$",
            ),
        ),
    },
    original_name=original_name,
    original_code="https://github.com/black-forest-labs/flux",
    licences=_NON_COMMERCIAL | {"schnell": Licence("apache-2.0")},
    reference_flavours=frozenset({"kontext"}),
    labels=_LABELS | {"schnell": ModelLabels("flux-1-schnell", "flux1")},
    dynamic_shift=shift_by_tokens,
    num_weights=dict.fromkeys(FLAVOURS, 11_900_000_000),
    layer_sides={
        name: {**LAYER_SIDES, _TIME_AND_GUIDANCE if flavour.has_guidance else _TIME: 256}
        for name, flavour in FLAVOURS.items()
    },
)

"""Spec of Flux.2. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from simpletuner.helpers.contracts import Licence, ModelLabels, ModelSpec, TargetAlias
from simpletuner.helpers.models.flux2.key_names import original_name
from simpletuner.helpers.models.key_groups import (
    FLOW_KEYS,
    GUIDANCE_KEYS,
    TRANSFORMER_KEYS,
    Flavour,
    unreadable_single_file,
    unused_guidance_keys,
)
from simpletuner.helpers.models.shift import DynamicShift

FLAVOURS: Mapping[str, Flavour] = {
    "dev": Flavour("black-forest-labs/FLUX.2-dev", has_guidance=True),
    "klein-base-4b": Flavour("black-forest-labs/FLUX.2-klein-base-4B", has_guidance=False),
    "klein-base-9b": Flavour("black-forest-labs/FLUX.2-klein-base-9B", has_guidance=False),
    "klein-4b": Flavour("black-forest-labs/FLUX.2-klein-4B", has_guidance=False),
    "klein-9b": Flavour("black-forest-labs/FLUX.2-klein-9B", has_guidance=False),
}
_NON_COMMERCIAL = {
    name: Licence(
        "other",
        "flux-dev-non-commercial-license" if name == "dev" else "flux-non-commercial-license",
        f"https://huggingface.co/{FLAVOURS[name].repository}/blob/main/LICENSE.md",
    )
    for name in ("dev", "klein-base-9b", "klein-9b")
}
SIZES = {name: "dev" if name == "dev" else name[-2:] for name in FLAVOURS}
"""Flavour -> size of its models."""
_LABELS = {
    "dev": ModelLabels("Flux.2-dev", "flux2"),
    "4b": ModelLabels("flux.2-klein-4b", "flux2_klein_4b"),
    "9b": ModelLabels("flux.2-klein-9b", "flux2_klein_9b"),
}
SHIFT_STEPS = 50
"""Number of steps for Flux.2's step-dependent shift; training has none, so it uses the pipeline default."""
MOST_FITTED_TOKENS = 4300
MOST_SINGLE_BLOCKS = 48
"""Single blocks of dev; Klein has 20 and 24."""


def empirical_shift(_scheduler: Mapping[str, object], num_tokens: int) -> float:
    """Shift for images of num_tokens at SHIFT_STEPS steps: mu is linear in tokens, and between fits in steps.

    Source: the constants of diffusers' Flux.2 pipelines, fitted at 10 and at 200 steps.
    """
    at_200_steps = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > MOST_FITTED_TOKENS:
        return math.exp(at_200_steps)
    at_10_steps = 8.73809524e-05 * num_tokens + 1.89833333
    share = (SHIFT_STEPS - 10) / 190
    return math.exp(at_10_steps + share * (at_200_steps - at_10_steps))


def training_shift(settings: Mapping[str, object], num_tokens: int) -> float | None:
    """Flux.1's shift in training, if flux2_training_shift asks for it; else None, that of sampling."""
    return DynamicShift()(num_tokens) if settings["flux2_training_shift"] == "flux1" else None


def problems(values: Mapping[str, object]) -> Mapping[str, str]:
    """Checks of Flux.2's keys: maps settings to {key: error message}."""
    return unused_guidance_keys(values, FLAVOURS, instead="dev") | unreadable_single_file(
        values, "pretrained_vae_model_name_or_path", component="Flux.2's VAE"
    )


_IN_BLOCKS = (
    *("AdaLayerNormContinuous", "Flux2Attention", "Flux2FeedForward", "Flux2Modulation", "ModuleList"),
    *("Flux2ParallelSelfAttention", "Flux2SingleTransformerBlock", "Flux2TransformerBlock"),
)
_IN_TIME = ("Flux2TimestepGuidanceEmbeddings", "TimestepEmbedding")
_WIDTHS = {name: 6144 if name == "dev" else 3072 if name.endswith("4b") else 4096 for name in FLAVOURS}

SPEC = ModelSpec(
    name="flux2",
    flavours={name: flavour.repository for name, flavour in FLAVOURS.items()},
    default_flavour="klein-base-4b",
    prediction_types=("flow_matching",),
    pixel_alignment=16,
    minimum_alignment=16,
    default_resolution=1024,
    lora_targets=(
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",
        # Full paths: "to_out" alone would also match the list around a double block's "to_out.0".
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(MOST_SINGLE_BLOCKS)),
    ),
    slider_targets=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"),
    denoiser_name="transformer",
    own_keys=FLOW_KEYS | GUIDANCE_KEYS | TRANSFORMER_KEYS | {"flux2_training_shift"},
    default_guidance=4.0,
    num_text_encoders=1,
    problems=problems,
    target_aliases={
        # A single block joins attention and feed-forward layers in one attention class.
        "Attention": TargetAlias(modules=("Flux2Attention", "Flux2ParallelSelfAttention")),
        "FeedForward": TargetAlias(modules=("Flux2FeedForward",)),
    },
    original_name=original_name,
    original_code="https://github.com/black-forest-labs/flux2",
    licences=_NON_COMMERCIAL | dict.fromkeys(("klein-base-4b", "klein-4b"), Licence("apache-2.0")),
    labels={name: _LABELS[size] for name, size in SIZES.items()},
    reference_flavours=frozenset(FLAVOURS),
    dynamic_shift=empirical_shift,
    training_shift=training_shift,
    layer_sides={
        name: dict.fromkeys(_IN_BLOCKS, width)
        | dict.fromkeys(_IN_TIME, 256)
        | dict.fromkeys(("Flux2Transformer2DModel", "Linear"), 128)
        for name, width in _WIDTHS.items()
    },
    num_weights={
        name: 32_200_000_000 if name == "dev" else 3_900_000_000 if name.endswith("4b") else 9_100_000_000
        for name in FLAVOURS
    },
)

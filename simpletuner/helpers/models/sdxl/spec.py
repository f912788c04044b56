"""Spec of SDXL. Imports no torch."""

from __future__ import annotations

from simpletuner.helpers.contracts import Licence, ModelLabels, ModelSpec, TargetAlias
from simpletuner.helpers.models.key_groups import DIFFUSION_KEYS, UNET_KEYS
from simpletuner.helpers.models.sdxl.key_names import original_name

_FLAVOURS = {
    "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
    "turbo": "stabilityai/sdxl-turbo",
}
_OUTSIDE = (
    "DownBlock2D",
    "Linear",
    "ModuleList",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "UNet2DConditionModel",
)
_IN_TRANSFORMERS = (
    *("Attention", "BasicTransformerBlock", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "FeedForward"),
    *("GEGLU", "Transformer2DModel"),
)
LAYER_SIDES: dict[str, int | None] = {
    **dict.fromkeys((*_OUTSIDE, "UpBlock2D"), 320),
    **dict.fromkeys(_IN_TRANSFORMERS, 640),
    "UNetMidBlock2DCrossAttn": 1280,
    **dict.fromkeys(("Conv2d", "Downsample2D", "Upsample2D"), None),
}

SPEC = ModelSpec(
    name="sdxl",
    flavours=_FLAVOURS,
    default_flavour="base-1.0",
    prediction_types=("epsilon", "v_prediction"),
    pixel_alignment=64,
    minimum_alignment=8,
    default_resolution=1024,
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    slider_targets=(
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "proj_in", "proj_out", "conv_in"),
        *("conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
    ),
    num_text_encoders=2,
    text_encoder_lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    own_keys=DIFFUSION_KEYS | UNET_KEYS | {"pretrained_config_name_or_path", "max_token_length"},
    target_aliases={
        "Attention": TargetAlias(modules=("Attention",)),
        "FeedForward": TargetAlias(modules=("FeedForward",)),
    },
    original_name=original_name,
    original_code="https://github.com/Stability-AI/generative-models",
    # Base 0.9's licence is not stated here: its card gives it no name.
    licences={
        "base-1.0": Licence("openrail++"),
        "turbo": Licence(
            "other",
            "sai-nc-community",
            "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md",
        ),
    },
    labels=dict.fromkeys((*_FLAVOURS, ""), ModelLabels("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")),
    num_weights=dict.fromkeys(_FLAVOURS, 2_600_000_000),
    layer_sides=dict.fromkeys(_FLAVOURS, LAYER_SIDES),
)

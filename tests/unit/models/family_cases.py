"""Tiny models of every family, and what diffusers' own pipelines make of them.

A family joins test_family_contract.py by an entry in CASES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simpletuner.helpers.contracts import NoisyBatch, Sample, Size
from simpletuner.helpers.models.flux.family import unpack
from simpletuner.helpers.models.flux.tiny import save_tiny_flux
from simpletuner.helpers.models.flux2.latents import from_tokens
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl

SIZE = Size(64, 80)
# Numbers that bfloat16 can hold: the stock SDXL pipeline rounds them.
SAMPLE = Sample(
    dataset_id="cats",
    path="cat.jpg",
    caption="a cat",
    original_px=Size(300, 450),
    resized_px=Size(64, 96),
    crop_top_left=(3, 17),
    target_px=SIZE,
)
SIGMA = 0.8180538415908813
"""A float32 value whose timestep bfloat16 rounds."""
GUIDANCE = 2.5
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """One tiny model and the stock pipeline's view of it."""

    name: str
    family: str
    save: Callable[..., None]
    """Writes the model to a folder; takes a seed."""
    components: tuple[str, ...]
    text_components: tuple[str, ...]
    """Those that prompt embeds depend on."""
    latent_shape: tuple[int, ...]
    """Of one image of SIZE."""
    pixels_per_latent: int
    stock_latents: Callable[[Any, Tensor], Tensor]
    """(stock pipeline, pixels) -> latents."""
    stock_text: Callable[[Any, str], dict[str, Tensor]]
    """(stock pipeline, prompt) -> its tensors by the names of TextEmbeds.tensors()."""
    text_dtype: torch.dtype | None = None
    """Of prompt embeds; None is the dtype of the text encoders."""
    max_tokens: int
    extra_tokens: int
    """Tokens around those of the prompt itself."""
    stock_options: Mapping[str, Any]
    """Arguments of the stock pipeline's call that reproduce SAMPLE, SIGMA and GUIDANCE."""
    noisy: Callable[[Call], NoisyBatch]
    """Call of the denoiser by the stock pipeline -> the noised batch that it stands for."""
    unpacked: Callable[[Tensor], Tensor]
    """Output of the denoiser -> [1, C, h, w]."""
    has_guidance: bool = False
    is_flow: bool = True
    pipeline_inputs: frozenset[str]
    """Names of the arguments that the family gives to its pipeline by default."""
    wrong_classes: Sequence[tuple[str, str, Any]]
    """(component, key, another class)."""
    misfits: Sequence[tuple[str, Mapping[str, Any], Sequence[str]]]
    """(component, changes of its configuration, names and values in the message)."""
    shifts: Sequence[tuple[Mapping[str, Any], Size, float]] = field(default=())
    """(noise settings, size of the image, shift of the noise levels)."""


def _sdxl_text(stock: Any, prompt: str) -> dict[str, Tensor]:
    # The empty prompt is what the pipeline takes without a negative prompt.
    embeds, negative, pooled, negative_pooled = stock.encode_prompt(prompt or "a cat")
    return {"tokens": embeds, "pooled": pooled} if prompt else {"tokens": negative, "pooled": negative_pooled}


def _flux_text(stock: Any, prompt: str) -> dict[str, Tensor]:
    tokens, pooled, _ = stock.encode_prompt(prompt)
    return {"tokens": tokens, "pooled": pooled}


def _flow_batch(latents: Tensor, *, has_guidance: bool) -> NoisyBatch:
    guidance = (GUIDANCE,) if has_guidance else None
    return NoisyBatch(latents, latents, (int(1000 * SIGMA),), torch.ones(1), (SIGMA,), guidance)


def _sdxl_batch(call: Call) -> NoisyBatch:
    latents, timestep = call[0]
    return NoisyBatch(latents, latents, (int(timestep),), torch.ones(1))


SDXL = FamilyCase(
    name="sdxl",
    family="sdxl",
    save=save_tiny_sdxl,
    components=("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    text_components=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    latent_shape=(4, 8, 10),
    pixels_per_latent=8,
    stock_latents=lambda stock, pixels: stock.vae.encode(pixels).latent_dist.mode() * 0.13025,
    stock_text=_sdxl_text,
    text_dtype=torch.float32,
    max_tokens=77,
    extra_tokens=2,
    stock_options={
        "guidance_scale": 1.0,
        "original_size": (300, 450),
        "crops_coords_top_left": (3, 17),
        "target_size": (64, 80),
    },
    noisy=_sdxl_batch,
    unpacked=lambda output: output,
    is_flow=False,
    pipeline_inputs=frozenset(
        {
            "prompt_embeds",
            "pooled_prompt_embeds",
            "negative_prompt_embeds",
            "negative_pooled_prompt_embeds",
            "guidance_scale",
        }
    ),
    wrong_classes=[
        ("unet", "_class_name", "FluxTransformer2DModel"),
        ("vae", "_class_name", "AutoencoderKLFlux2"),
        ("text_encoder_2", "architectures", ["T5EncoderModel"]),
        ("text_encoder", "architectures", None),
    ],
    misfits=[
        ("unet", {"in_channels": 9}, ["in_channels", "9", "4"]),
        ("unet", {"cross_attention_dim": 768}, ["cross_attention_dim", "768", "64"]),
        (
            "unet",
            {"projection_class_embeddings_input_dim": 72},
            ["projection_class_embeddings_input_dim", "72", "80"],
        ),
        ("unet", {"addition_embed_type": None}, ["addition_embed_type None", "text_time"]),
        ("vae", {"latent_channels": 16}, ["in_channels", "4", "16"]),
        ("text_encoder", {"hidden_size": None}, ["no number for hidden_size"]),
        ("scheduler", {"num_train_timesteps": 500}, ["num_train_timesteps", "500", "1000"]),
    ],
)


FLUX = FamilyCase(
    name="flux",
    family="flux",
    save=save_tiny_flux,
    components=(
        *("transformer", "vae", "text_encoder", "text_encoder_2"),
        *("tokenizer", "tokenizer_2", "scheduler"),
    ),
    text_components=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    latent_shape=(4, 8, 10),
    pixels_per_latent=8,
    stock_latents=lambda stock, pixels: (stock.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611,
    stock_text=_flux_text,
    max_tokens=512,
    extra_tokens=1,
    stock_options={"guidance_scale": GUIDANCE, "sigmas": [SIGMA, 0.25]},
    noisy=lambda call: _flow_batch(unpack(call[1]["hidden_states"].float(), height=4), has_guidance=True),
    unpacked=lambda output: unpack(output, height=4),
    has_guidance=True,
    pipeline_inputs=frozenset(
        {
            *("prompt_embeds", "pooled_prompt_embeds", "guidance_scale", "true_cfg_scale"),
            *("sigmas", "joint_attention_kwargs"),
        }
    ),
    wrong_classes=[
        ("transformer", "_class_name", "UNet2DConditionModel"),
        ("vae", "_class_name", "AutoencoderKLFlux2"),
        ("text_encoder", "architectures", ["T5EncoderModel"]),
        ("text_encoder_2", "architectures", ["CLIPTextModel"]),
    ],
    misfits=[
        ("transformer", {"joint_attention_dim": 64}, ["joint_attention_dim", "64", "32"]),
        ("vae", {"latent_channels": 8}, ["in_channels", "16", "32"]),
        ("text_encoder", {"hidden_size": 64}, ["pooled_projection_dim", "32", "64"]),
        ("text_encoder_2", {"d_model": None}, ["no number for d_model"]),
    ],
    shifts=[
        ({}, Size(64, 64), math.exp(0.5 + (16 - 256) * 0.65 / 3840)),
        ({}, Size(1024, 1024), math.exp(1.15)),
        ({"flow_schedule_shift": 3.0}, Size(64, 64), 3.0),
        ({"flow_schedule_shift": 0}, Size(64, 64), 1.0),
        ({"flow_schedule_auto_shift": True}, Size(1024, 1024), math.exp(1.15)),
    ],
)


def _flux2(*, klein: bool) -> FamilyCase:
    other_encoder = "Mistral3ForConditionalGeneration" if klein else "Qwen3ForCausalLM"
    inputs = {"prompt_embeds", "guidance_scale", "sigmas"}
    # dev's text encoder has its numbers in a section, which test_flux2_components.py changes.
    text_misfits = [
        ("text_encoder", {"hidden_size": 32}, ["joint_attention_dim", "48", "96"]),
        ("text_encoder", {"hidden_size": None}, ["no number for hidden_size"]),
        ("text_encoder", {"num_hidden_layers": 26}, ["26 layers", "layer 27"]),
    ]
    return FamilyCase(
        name="flux2-klein" if klein else "flux2-dev",
        family="flux2",
        save=partial(save_tiny_flux2, klein=klein),
        components=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
        text_components=("text_encoder", "tokenizer"),
        latent_shape=(16, 4, 5),
        pixels_per_latent=16,
        stock_latents=lambda stock, pixels: stock._encode_vae_image(pixels, None),
        stock_text=lambda stock, prompt: {"tokens": stock.encode_prompt(prompt)[0]},
        max_tokens=512,
        extra_tokens=34 if klein else 129,
        stock_options={"guidance_scale": GUIDANCE, "sigmas": [SIGMA, 0.25]},
        noisy=lambda call: _flow_batch(
            from_tokens(call[1]["hidden_states"].float(), height=4), has_guidance=not klein
        ),
        unpacked=lambda output: from_tokens(output, height=4),
        has_guidance=not klein,
        pipeline_inputs=frozenset(inputs | {"negative_prompt_embeds"} if klein else inputs),
        wrong_classes=[
            ("transformer", "_class_name", "FluxTransformer2DModel"),
            ("vae", "_class_name", "AutoencoderKL"),
            ("text_encoder", "architectures", [other_encoder]),
        ],
        misfits=[
            ("transformer", {"in_channels": 128}, ["in_channels", "128", "16"]),
            ("vae", {"latent_channels": 32}, ["in_channels", "16", "128"]),
            ("transformer", {"joint_attention_dim": 7680}, ["joint_attention_dim", "7680", "48"]),
            *(text_misfits if klein else ()),
        ],
        shifts=[
            # By hand: 4096 tokens lie between mu 2.25622 at 10 steps and 1.15 at 200, so 50 steps give
            # 2.02332; 20 tokens likewise between 1.90008 and 0.46004; above 4300 tokens mu is
            # 0.00016927 n + 0.45666666.
            ({}, Size(1024, 1024), math.exp(2.02332)),
            ({}, Size(64, 80), math.exp(1.59691)),
            ({}, Size(1280, 1280), math.exp(0.00016927 * 6400 + 0.45666666)),
            ({"flow_schedule_shift": 3.0}, Size(64, 80), 3.0),
            ({"flow_schedule_auto_shift": True}, Size(64, 80), math.exp(1.59691)),
        ],
    )


CASES = {case.name: case for case in (SDXL, FLUX, _flux2(klein=False), _flux2(klein=True))}

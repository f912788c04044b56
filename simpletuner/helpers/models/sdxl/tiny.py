"""SDXL's real classes at toy size, in the diffusers folder layout, made without a download."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.tiny_parts import (
    CLIP_END,
    clip_text_config,
    fill_weights,
    make_clip_tokenizer,
)

TEXT_WIDTH = 32
TIME_WIDTH = 8


def save_tiny_sdxl(folder: Path, *, seed: int = 0, depth: int = 2) -> None:
    """Write a complete SDXL model of about 2 MB; a seed gives the same bytes on every machine.

    At depth 2 the UNet has 16 attention and 8 feed-forward layers, at depth 1 half as many. Their linear
    layers have edges of at least 32.
    Widths: latents 4 channels at 1/8 of the pixels, text 2 x 32, pooled text 32.
    """
    tokenizer, tokenizer_2 = make_clip_tokenizer(pad=CLIP_END), make_clip_tokenizer(pad="!")
    unet, vae = make_unet(depth=depth), make_vae()
    text_encoder = CLIPTextModel(clip_text_config(tokenizer, width=TEXT_WIDTH))
    text_encoder_2 = CLIPTextModelWithProjection(clip_text_config(tokenizer_2, width=TEXT_WIDTH))
    for index, module in enumerate((unet, vae, text_encoder, text_encoder_2)):
        fill_weights(module, seed=seed * 4 + index)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    with quiet():
        pipeline.save_pretrained(folder)


def make_unet(*, depth: int = 2) -> UNet2DConditionModel:
    """A UNet of two resolutions with SDXL's size and crop conditioning; width 32 at attention layers.

    Args:
        depth: Transformer layers of each block that has any.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, depth),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + TEXT_WIDTH,
        norm_num_groups=8,
    )


def make_vae() -> AutoencoderKL:
    """A VAE with four resolutions: one latent position per 8 x 8 pixels, as in SDXL."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    )

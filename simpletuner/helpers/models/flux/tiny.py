"""Flux.1's real classes at toy size, in the diffusers folder layout, made without a download."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.tiny_parts import (
    CLIP_END,
    WORD_LIST,
    clip_text_config,
    fill_weights,
    make_clip_tokenizer,
)

TEXT_WIDTH = 32
T5_MAX_TOKENS = 512
LATENT_CHANNELS = 4


def save_tiny_flux(folder: Path, *, has_guidance: bool = True, seed: int = 0) -> None:
    """Write a complete Flux.1 model of about 1 MB; a seed gives the same bytes on every machine.

    Two double and two single blocks of width 32; latents of 4 channels at 1/8 of the pixels.

    Args:
        folder: Created if missing.
        has_guidance: With a guidance embedding as dev, else without as schnell.
        seed: Seed of the weights.
    """
    tokenizer, tokenizer_2 = make_clip_tokenizer(pad=CLIP_END), make_t5_tokenizer()
    transformer, vae = make_transformer(has_guidance=has_guidance), make_vae()
    text_encoder = CLIPTextModel(clip_text_config(tokenizer, width=TEXT_WIDTH))
    text_encoder_2 = T5EncoderModel(_t5_config(tokenizer_2))
    for index, module in enumerate((transformer, vae, text_encoder, text_encoder_2)):
        fill_weights(module, seed=seed * 4 + index)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    if not has_guidance:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = FluxPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=scheduler,
    )
    with quiet():
        pipeline.save_pretrained(folder)


def make_transformer(*, has_guidance: bool = True) -> FluxTransformer2DModel:
    """A transformer of two double and two single blocks with two heads of 16."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=has_guidance,
        axes_dims_rope=(4, 4, 8),
    )


def make_vae() -> AutoencoderKL:
    """A VAE with four resolutions, shift and scaling factor, as Flux.1's."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with the word list and every printable character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -6.0) for word in WORD_LIST.split() if len(word) > 1]
    pieces += [(chr(code), -10.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_MAX_TOKENS)


def _t5_config(tokenizer: T5Tokenizer) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )

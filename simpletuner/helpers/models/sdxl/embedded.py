"""The embedded SDXL of the demo: real classes and folder layout, six million weights, 64 px images.

Shapes: B batch, L text tokens, D text width, P pooled width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.tiny_parts import (
    CLIP_END,
    CLIP_END_OF_WORD,
    CLIP_START,
    byte_alphabet,
    learn_merges,
    make_vocabulary,
)

EDGE_PX = 64
LATENT_EDGE = 16
MAX_TOKENS = 32
TEXT_WIDTH = 64
TIME_WIDTH = 8
SCALING_FACTOR = 0.13025
"""SDXL's own; the latents are made to fit it."""


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Components of the model."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer

    def denoising_modules(self) -> tuple[nn.Module, ...]:
        """Modules trained on latents: all but the VAE."""
        return self.unet, self.text_encoder, self.text_encoder_2

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """Encode prompts to [B, L, D] and [B, P] as SDXL's pipeline does, with gradients."""
        encoded = []
        for tokenizer, encoder in (
            (self.tokenizer, self.text_encoder),
            (self.tokenizer_2, self.text_encoder_2),
        ):
            ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
            encoded.append(encoder(ids.input_ids.to(encoder.device), output_hidden_states=True))
        tokens = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        return TextEmbeds(prompt_embeds=tokens, pooled=encoded[1].text_embeds)

    def predict(self, latents: Tensor, *, timesteps: Tensor, text: TextEmbeds, sizes: Tensor) -> Tensor:
        """Run the UNet on [B, 4, h, w] latents; `sizes` is [B, 6], SDXL's size and crop values."""
        assert text.pooled is not None, "SDXL needs pooled embeddings"
        predicted: Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=text.prompt_embeds,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
            return_dict=False,
        )[0]
        return predicted

    def pipeline(self) -> StableDiffusionXLPipeline:
        """The stock pipeline with these components."""
        with quiet():
            pipeline = StableDiffusionXLPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                text_encoder_2=self.text_encoder_2,
                tokenizer=self.tokenizer,
                tokenizer_2=self.tokenizer_2,
                unet=self.unet,
                scheduler=make_scheduler(),
                force_zeros_for_empty_prompt=True,
                add_watermarker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def save_half(model: EmbeddedModel, folder: Path) -> None:
    """Write the model to a folder in float16, in the diffusers layout."""
    modules = (*model.denoising_modules(), model.vae)
    weights = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in modules]
    try:
        with quiet():
            for module in modules:
                module.half()
            model.pipeline().save_pretrained(folder)
    finally:
        for module, each in zip(modules, weights, strict=True):
            module.float().load_state_dict(each)


def load_pipeline(folder: Path, *, device: torch.device) -> StableDiffusionXLPipeline:
    """The stock pipeline of a model folder, in float32."""
    with quiet():
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, add_watermarker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_embedded(words: Sequence[str], *, seed: int) -> EmbeddedModel:
    """An untrained model; each of these words is one token of its tokenizers."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = (_make_tokenizer(words, pad=pad) for pad in (CLIP_END, "!"))
    text_encoder = CLIPTextModel(_text_config(tokenizer))
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer_2))
    unet = _make_unet()
    for encoder in (text_encoder, text_encoder_2):
        _let_words_differ(encoder)
    _let_words_be_heard(unet)
    _let_borders_be_felt(unet)
    return EmbeddedModel(
        unet=unet,
        vae=_make_vae(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's sampling schedule with v-prediction.

    With noise prediction a UNet of this size learns positions very late: at the noise levels that decide
    them, an error in the noise is a hundred times the error in the image.
    """
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="v_prediction",
    )


def standardise_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Change the VAE so that each channel of these [N, 4, h, w] latents, scaled, has mean 0 and std 1.

    Decoded images stay the same.

    Returns:
        [N, 4, h, w] scaled latents of the changed VAE.
    """
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    scaled = (latents - mean[:, None, None]) / spread[:, None, None]
    num, mean = len(mean), mean.to(vae.device)
    std = spread.to(vae.device) * SCALING_FACTOR
    with torch.no_grad():
        out_weight, out_bias = vae.quant_conv.weight, vae.quant_conv.bias
        out_weight[:num] /= std[:, None, None, None]
        out_bias[:num].sub_(mean).div_(std)
        out_bias[num:] -= 2 * std.log()  # the second half is the logarithm of the variance
        in_weight, in_bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
        in_bias += (in_weight[:, :, 0, 0] * mean).sum(dim=1)
        in_weight *= std[None, :, None, None]
    return scaled


def _make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_EDGE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + TEXT_WIDTH,
        norm_num_groups=16,
    )


def _let_words_differ(encoder: nn.Module) -> None:
    """Initialise token and position embeddings a hundred times larger than CLIP, so that they train fast."""
    for name, weight in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(weight, std=1.0)
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(weight, std=0.5)


def _let_words_be_heard(unet: UNet2DConditionModel) -> None:
    """Initialise cross-attention so large that it attends to single words, not to the mean of all."""
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k")):
            nn.init.normal_(module.weight, std=1.4 * module.in_features**-0.5)
        elif name.endswith("attn2.to_v"):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def _let_borders_be_felt(unet: UNet2DConditionModel) -> None:
    """Initialise biases large: a UNet learns positions only from the zero padding at the borders."""
    nn.init.normal_(unet.conv_in.bias, std=1.0)
    for name, module in unet.named_modules():
        if "resnets" in name and isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.bias, std=1.0)


def _make_vae() -> AutoencoderKL:
    """A VAE with three resolutions: one latent position per 4 x 4 pixels."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=EDGE_PX,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def _make_tokenizer(words: Sequence[str], *, pad: str) -> CLIPTokenizer:
    alphabet = byte_alphabet()
    merges = learn_merges(words, end_of_word=CLIP_END_OF_WORD)
    symbols = [*alphabet, *(symbol + CLIP_END_OF_WORD for symbol in alphabet)]
    vocab = make_vocabulary(symbols, merges=merges, special=(CLIP_START, CLIP_END))
    return CLIPTokenizer(
        vocab=vocab, merges=cast("list[str]", list(merges)), model_max_length=MAX_TOKENS, pad_token=pad
    )


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

"""SDXL's real classes at toy size, in the diffusers folder layout, made without any download.

The weights are random but exactly reproducible: they come from integers of a seeded generator and from
arithmetic that IEEE 754 rounds one way only, never from torch's initialisers, whose last bits depend on
the processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod, sqrt
from pathlib import Path
from typing import cast

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.helpers.models.components import quiet

WORD_LIST = """
a an and animal at background black blue body brown by camera cat close color dark day dog ear eye eyes face
field fluffy forest fox from front fur ginger green grey head high house image in is it kitten light looking
lying nose of on orange painting person photo photograph picture portrait quality red road room sea sitting
sks sky small sofa soft studio sun tabby the to tree up watercolor whiskers white window with yellow
"""
Pair = tuple[str, str]

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77

TEXT_WIDTH = 32
TIME_WIDTH = 8
NUM_WEIGHT_LEVELS = 1 << 16
"""How many values a weight can take between its bounds."""


def save_tiny_sdxl(folder: Path, *, seed: int = 0) -> None:
    """Write a complete SDXL model of about 2 MB to folder, byte for byte the same for the same seed.

    The UNet has 16 attention and 8 feed-forward layers, none of their linear layers with an edge below 32.
    Widths: latents 4 channels at 1/8 of the pixels, text 2 x 32, pooled text 32.
    """
    tokenizer, tokenizer_2 = make_tokenizer(pad=END), make_tokenizer(pad="!")
    unet, vae = make_unet(), make_vae()
    text_encoder = CLIPTextModel(_text_config(tokenizer))
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer_2))
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


def make_unet() -> UNet2DConditionModel:
    """A UNet of two resolutions with SDXL's size and crop conditioning; width 32 wherever attention is."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + TEXT_WIDTH,
        norm_num_groups=8,
    )


def make_vae() -> AutoencoderKL:
    """An autoencoder with four resolutions, so that 8 x 8 pixels become one latent position as in SDXL."""
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


def make_tokenizer(*, pad: str) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and a short word list; built by hand, since trainers vary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(symbol + END_OF_WORD for symbol in alphabet)])
    merges = _learn_merges(WORD_LIST.split())
    tokens |= dict.fromkeys("".join(merge) for merge in merges)
    tokens |= dict.fromkeys((START, END))
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocab, merges=cast("list[str]", list(merges)), model_max_length=MAX_TOKENS, pad_token=pad
    )


def fill_weights(module: nn.Module, *, seed: int) -> None:
    """Set every parameter: norms to the identity, biases to zero, the rest uniform within 1/sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.copy_(_uniform(parameter.shape, generator=generator))


def _uniform(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """Values on a grid in [-1, 1) divided by the root of the fan in, from exactly rounded operations only."""
    levels = torch.randint(NUM_WEIGHT_LEVELS, tuple(shape), generator=generator, dtype=torch.int64)
    unit = levels.to(torch.float64) * (2 / NUM_WEIGHT_LEVELS) - 1
    return (unit / sqrt(prod(shape[1:]))).to(torch.float32)


def _learn_merges(words: Sequence[str]) -> dict[Pair, int]:
    """Byte-pair merges and their ranks, such that each word ends as a single token."""
    ranks: dict[Pair, int] = {}
    for word in words:
        while len(parts := _segment(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    return ranks


def _segment(word: str, ranks: Mapping[Pair, int]) -> list[str]:
    """The tokens of a word: of its neighbours that are a known pair the lowest rank joins, until none are."""
    parts = [*word[:-1], word[-1] + END_OF_WORD]
    while known := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        # CLIP pools at the end token, so the ids must be those of this tokenizer.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

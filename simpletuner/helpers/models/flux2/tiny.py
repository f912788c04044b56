"""Flux.2's real classes at toy size, in the diffusers folder layout, made without a download."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import nn
from transformers import (
    GPT2Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.tiny_parts import (
    SPACE,
    WORD_LIST,
    Pair,
    byte_alphabet,
    fill_weights,
    learn_merges,
    make_vocabulary,
)

TEXT_WIDTH = 16
NUM_QWEN_LAYERS = 28
"""The pipeline uses hidden state 27, and there is one more state than layers."""
NUM_MISTRAL_LAYERS = 31
"""The pipeline uses hidden state 30."""
NUM_TEXT_STATES = 3
LATENT_CHANNELS = 4
PATCH_AREA = 4
"""Latent positions per token: 2 x 2."""
MAX_TOKENS = 4096

QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TEMPLATE = """
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
"""
MISTRAL_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"),
)
MISTRAL_TEMPLATE = """
{{- bos_token }}
{%- for message in messages %}
{%- set mark = 'SYSTEM_PROMPT]' if message.role == 'system' else 'INST]' %}
{{- '[' + mark }}{% for part in message.content %}{{ part.text }}{% endfor %}{{ '[/' + mark }}
{%- endfor %}
"""


def save_tiny_flux2(folder: Path, *, klein: bool, is_distilled: bool = False, seed: int = 0) -> None:
    """Write a complete Flux.2 model of about 1 MB; a seed gives the same bytes on every machine.

    The transformer has two double and two single blocks of width 32. Widths: latents 4 channels at 1/8 of the
    pixels, 16 in a token, text 3 x 16.

    Args:
        folder: Created if missing.
        klein: Qwen3 text encoder, no guidance embedding; else Mistral3 and a guidance embedding as dev.
        is_distilled: Whether Klein is distilled, so that the pipeline samples without guidance.
        seed: Seed of the weights.
    """
    tokenizer, text_encoder = make_qwen() if klein else make_mistral()
    transformer, vae = make_transformer(guidance_embeds=not klein), make_vae()
    for index, module in enumerate((transformer, vae, text_encoder)):
        fill_weights(module, seed=seed * 3 + index)
    components = {
        "scheduler": make_scheduler(),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    with quiet():
        pipeline: DiffusionPipeline = (
            Flux2KleinPipeline(**components, is_distilled=is_distilled)
            if klein
            else Flux2Pipeline(**components)
        )
        pipeline.save_pretrained(folder)


def make_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """Two double and two single blocks; linear layers have edges of at least 16."""
    return Flux2Transformer2DModel(
        in_channels=PATCH_AREA * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=NUM_TEXT_STATES * TEXT_WIDTH,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def make_vae() -> AutoencoderKLFlux2:
    """A VAE whose batch-norm statistics differ from channel to channel."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )
    steps = torch.arange(PATCH_AREA * LATENT_CHANNELS) / 16  # [0, 1) in sixteenths
    vae.bn.running_mean.copy_(steps - 0.5)
    vae.bn.running_var.copy_(steps + 0.25)
    return vae


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of the released models."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer with the word list and the chat template of a thinking model."""
    vocabulary, merges = _byte_level(QWEN_SPECIAL)
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=cast("list[str]", list(merges)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=MAX_TOKENS,
        chat_template=QWEN_TEMPLATE,
    )


def make_mistral_tokenizer() -> GPT2Tokenizer:
    """A byte-level tokenizer with the word list and a chat template; pads on the left.

    dev's tokenizer is part of an image processor, which needs torchvision.
    """
    vocabulary, merges = _byte_level(MISTRAL_SPECIAL)
    return GPT2Tokenizer(
        vocab=vocabulary,
        merges=cast("list[str]", list(merges)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(MISTRAL_SPECIAL[3:-1]),
        model_max_length=MAX_TOKENS,
        padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
    )


def make_qwen() -> tuple[PreTrainedTokenizerFast, nn.Module]:
    """A Qwen3 with the layers that the pipeline uses, and its tokenizer."""
    tokenizer = make_qwen_tokenizer()
    return tokenizer, Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=NUM_QWEN_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_mistral() -> tuple[PreTrainedTokenizerFast, nn.Module]:
    """A Mistral3 with the layers that the pipeline uses and a vision tower, and its tokenizer."""
    tokenizer = make_mistral_tokenizer()
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=NUM_MISTRAL_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    image_token = tokenizer.get_vocab()["[IMG]"]
    return tokenizer, Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    )


def _byte_level(special: tuple[str, ...]) -> tuple[dict[str, int], dict[Pair, int]]:
    """Vocabulary and merges; a word is one token, with or without a space before it."""
    words = [form for word in WORD_LIST.split() for form in (word, SPACE + word)]
    merges = learn_merges(words)
    return make_vocabulary(byte_alphabet(), merges=merges, special=special), merges

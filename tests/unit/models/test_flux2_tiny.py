"""The tiny Flux.2 models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input

from simpletuner.helpers.models.flux2.tiny import (
    make_mistral_tokenizer,
    make_qwen_tokenizer,
    make_transformer,
)


def test_rank_8_fits_every_linear_layer_of_the_attention_and_feed_forward_layers() -> None:
    names = ("Flux2Attention", "Flux2ParallelSelfAttention", "Flux2FeedForward")
    modules = make_transformer(guidance_embeds=True).modules()
    targets = [each for each in modules if type(each).__name__ in names]
    linears = [each for target in targets for each in target.modules() if isinstance(each, torch.nn.Linear)]
    assert len(linears) == 2 * 12 + 2 * 2
    assert min(min(linear.weight.shape) for linear in linears) >= 16


def test_the_channels_of_the_tiny_autoencoder_have_statistics_of_their_own(
    tiny: Callable[[str], Path],
) -> None:
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(tiny("flux2-dev") / "vae")
    assert vae.bn.running_mean.unique().numel() == 16
    assert vae.bn.running_var.unique().numel() == 16


@pytest.mark.parametrize("make", [make_qwen_tokenizer, make_mistral_tokenizer])
def test_the_tokenizers_know_their_words_and_can_spell_the_rest(make: Callable[[], object]) -> None:
    tokenizer = make()
    assert tokenizer.tokenize("a photo of a cat") == ["a", "Ġphoto", "Ġof", "Ġa", "Ġcat"]
    ids = tokenizer("naïve 猫!", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "naïve 猫!"


def test_the_chat_templates_put_the_caption_where_the_real_ones_do() -> None:
    qwen, mistral = make_qwen_tokenizer(), make_mistral_tokenizer()
    asked = qwen.apply_chat_template(
        [{"role": "user", "content": "a cat"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert asked == ("<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    (told,) = mistral.apply_chat_template(format_input(["a cat"], "be brief"), tokenize=False)
    assert told == "<s>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]a cat[/INST]"

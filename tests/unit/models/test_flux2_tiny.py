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
    save_tiny_flux2,
)

TinyFlux2 = Callable[[str], Path]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_save_tiny_flux2_gives_the_same_bytes_again(tiny_flux2: TinyFlux2, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(99)
    save_tiny_flux2(tmp_path, klein=kind == "klein")
    assert files_of(tmp_path) == files_of(tiny_flux2(kind))


def test_save_tiny_flux2_gives_other_weights_for_another_seed(tiny_flux2: TinyFlux2, tmp_path: Path) -> None:
    save_tiny_flux2(tmp_path, klein=True, seed=1)
    first, second = files_of(tiny_flux2("klein")), files_of(tmp_path)
    assert {file.suffix for file in first if first[file] != second[file]} == {".safetensors"}
    assert sum(first[file] != second[file] for file in first) == 3


@pytest.mark.parametrize(
    ("kind", "pipeline"), [("dev", diffusers.Flux2Pipeline), ("klein", diffusers.Flux2KleinPipeline)]
)
def test_stock_diffusers_loads_the_tiny_model(
    tiny_flux2: TinyFlux2, kind: str, pipeline: type[diffusers.DiffusionPipeline]
) -> None:
    loaded = diffusers.DiffusionPipeline.from_pretrained(tiny_flux2(kind), use_safetensors=True)
    assert type(loaded) is pipeline
    loaded.set_progress_bar_config(disable=True)
    image = loaded(prompt="a cat", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert image.std() > 0.01


def test_rank_8_fits_every_linear_layer_of_the_attention_and_feed_forward_layers() -> None:
    names = ("Flux2Attention", "Flux2ParallelSelfAttention", "Flux2FeedForward")
    modules = make_transformer(guidance_embeds=True).modules()
    targets = [each for each in modules if type(each).__name__ in names]
    linears = [each for target in targets for each in target.modules() if isinstance(each, torch.nn.Linear)]
    assert len(linears) == 2 * 12 + 2 * 2
    assert min(min(linear.weight.shape) for linear in linears) >= 16


def test_the_channels_of_the_tiny_autoencoder_have_statistics_of_their_own(tiny_flux2: TinyFlux2) -> None:
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(tiny_flux2("dev") / "vae")
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

"""The embedded model's parts: what the training sees is what the stock pipeline and the family see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.sdxl.embedded import (
    MAX_TOKENS,
    SCALING_FACTOR,
    EmbeddedModel,
    load_pipeline,
    make_embedded,
    save_half,
    standardise_latents,
)
from simpletuner.helpers.models.sdxl.family import SDXL

WORDS = ("a", "red", "circle", "sks", "toy")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> EmbeddedModel:
    return make_embedded(WORDS, seed=0)


@pytest.fixture(scope="module")
def saved(model: EmbeddedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "embedded"
    save_half(model, folder)
    return folder


def test_a_seed_gives_the_same_weights_again_and_another_others(model: EmbeddedModel) -> None:
    weight = model.unet.conv_in.weight
    assert torch.equal(make_embedded(WORDS, seed=0).unet.conv_in.weight, weight)
    assert not torch.equal(make_embedded(WORDS, seed=1).unet.conv_in.weight, weight)


def test_each_word_is_one_token_in_both_tokenizers(model: EmbeddedModel) -> None:
    for tokenizer in (model.tokenizer, model.tokenizer_2):
        assert tokenizer.tokenize(" ".join(WORDS)) == [f"{word}</w>" for word in WORDS]
        assert len(tokenizer("a", padding="max_length").input_ids) == MAX_TOKENS


def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(model: EmbeddedModel) -> None:
    prompts = ["a red circle", "a sks toy"]
    text = model.encode_prompts(prompts)
    with torch.no_grad():
        tokens, _, pooled, _ = model.pipeline().encode_prompt(prompts, device=CPU)
    assert text.pooled is not None
    torch.testing.assert_close(text.prompt_embeds, tokens)
    torch.testing.assert_close(text.pooled, pooled)
    assert text.prompt_embeds.requires_grad


def test_saving_leaves_the_model_in_float32_bit_for_bit(model: EmbeddedModel, saved: Path) -> None:
    fresh = make_embedded(WORDS, seed=0)
    for module, other in zip(model.denoising_modules(), fresh.denoising_modules(), strict=True):
        for (name, tensor), expected in zip(
            module.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, expected), name
    assert sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) < 12e6


def test_the_stock_pipeline_draws_64_px_from_the_saved_folder(saved: Path) -> None:
    image = load_pipeline(saved, device=CPU)("a red circle", num_inference_steps=1, output_type="np").images[
        0
    ]
    assert image.shape == (64, 64, 3)


def test_the_family_loads_the_saved_folder_and_encodes_it_alike(
    saved: Path, model: EmbeddedModel, sdxl: Callable[..., SDXL]
) -> None:
    family = sdxl(saved)
    family.load_text_encoders()
    text = family.encode_prompts(["a red circle"])[0]
    torch.testing.assert_close(
        text.prompt_embeds, model.encode_prompts(["a red circle"]).prompt_embeds, rtol=0, atol=0.02
    )
    family.load_vae()
    latents = family.encode_images(torch.zeros(1, 3, 64, 64))
    assert latents.shape == (1, 4, 16, 16)


def test_text_encoders_too_short_for_chunks_are_refused(saved: Path, sdxl: Callable[..., SDXL]) -> None:
    with pytest.raises(ModelError, match=f"max_token_length 150.*{MAX_TOKENS}"):
        sdxl(saved, max_token_length=150).load_text_encoders()


def test_standardised_latents_have_mean_0_and_spread_1_and_decode_to_the_same() -> None:
    vae = make_embedded(WORDS, seed=3).vae
    pixels = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        decoded = vae.decode(before.mode()).sample
        scaled = standardise_latents(vae, before.mode())
        after = vae.encode(pixels).latent_dist
        torch.testing.assert_close(after.mode() * SCALING_FACTOR, scaled, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(vae.decode(after.mode()).sample, decoded, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)
    ratio = after.std / before.std  # the spread of a sample shrinks as the latents themselves do
    torch.testing.assert_close(
        ratio,
        (after.mode().std(dim=(0, 2, 3)) / before.mode().std(dim=(0, 2, 3)))[:, None, None].expand_as(ratio),
        rtol=1e-3,
        atol=1e-5,
    )

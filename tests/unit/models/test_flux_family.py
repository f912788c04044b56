"""What is Flux.1's alone; test_family_contract.py has what all families share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from scipy.special import logit

from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import ValidationConfig
from simpletuner.helpers.contracts import Batch, Sample, Size, TextEmbeds
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.flow_matching import distribution_of, sample_sigma, timestep_input
from simpletuner.helpers.models.flux.family import Flux, image_ids, pack, unpack
from simpletuner.helpers.models.flux.tiny import save_tiny_flux

MakeFlux = Callable[..., Flux]
SAMPLE = Sample(
    dataset_id="cats",
    path="cat.jpg",
    caption="a cat",
    original_px=Size(64, 96),
    resized_px=Size(64, 96),
    crop_top_left=(0, 0),
    target_px=Size(64, 96),
)


@pytest.fixture(scope="module")
def flux(make: Callable[..., ModelFamily]) -> MakeFlux:
    """Makes the family; keywords change the model's configuration."""
    return partial(make, "flux")


@pytest.fixture(scope="module")
def stock(tiny: Callable[[str], Path]) -> diffusers.FluxPipeline:
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny("flux"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch_of(family: Flux, prompts: list[str], latents: torch.Tensor) -> Batch:
    family.load_text_encoders()
    text = TextEmbeds.stack(family.encode_prompts(prompts))
    return Batch(latents, text, samples=(SAMPLE,) * len(prompts), sample_indices=tuple(range(len(prompts))))


def test_pack_is_what_the_pipeline_does_and_unpack_undoes_it(stock: diffusers.FluxPipeline) -> None:
    latents = torch.randn(2, 4, 8, 12)
    tokens = pack(latents)
    assert torch.equal(tokens, stock._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(unpack(tokens, height=4), latents)
    ids = stock._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(4, 6, device=torch.device("cpu")), ids)


def test_time_is_rounded_as_the_pipeline_rounds_it_in_16_bits() -> None:
    sigmas = torch.linspace(1, 0.001, 200)
    found = timestep_input(sigmas.tolist(), dtype=torch.bfloat16)
    assert torch.equal(found, (sigmas * 1000).to(torch.bfloat16) / 1000)
    assert not torch.equal(found, sigmas.to(torch.bfloat16)), "rounding once is not what pipelines do"


@pytest.mark.parametrize(
    ("flavour", "has_guidance", "length"),
    [
        *((None, True, 512), ("krea", True, 512), ("kontext", True, 512)),
        *(("schnell", False, 256), (None, False, 256)),
    ],
)
def test_captions_have_the_length_of_the_flavour(
    flux: MakeFlux, tmp_path: Path, flavour: str | None, has_guidance: bool, length: int
) -> None:
    save_tiny_flux(tmp_path / "model", has_guidance=has_guidance)
    family = flux(tmp_path / "model", model_flavour=flavour)
    of_dev = flux(tmp_path / "model", model_flavour="dev")
    assert (family.text_identity == of_dev.text_identity) is (length == 512), "cached apart"
    family.load_text_encoders()
    assert family.encode_prompts(["a cat"])[0].prompt_embeds.shape == (1, length, 32)
    noisy = family.add_noise(torch.zeros(1, 4, 8, 8), sample_indices=[0], seed=1)
    assert (noisy.guidance is not None) is has_guidance


def test_masked_attention_makes_the_prediction_independent_of_the_padding(flux: MakeFlux) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    masked, plain = flux(noise=NoiseConfig(flux_attention_masked_training=True)), flux()
    denoiser = plain.load_denoiser()
    batch = batch_of(plain, ["a cat"], latents)
    assert batch.text.attention_mask is not None
    tokens = batch.text.prompt_embeds.clone()
    tokens[~batch.text.attention_mask] += 1.0
    other = Batch(
        latents,
        TextEmbeds(prompt_embeds=tokens, pooled=batch.text.pooled, attention_mask=batch.text.attention_mask),
        samples=batch.samples,
        sample_indices=batch.sample_indices,
    )
    noisy = plain.add_noise(latents, sample_indices=[0], seed=1)
    same = [masked.predict(denoiser, noisy, each) for each in (batch, other)]
    torch.testing.assert_close(*same, rtol=1e-5, atol=1e-6)
    different = [plain.predict(denoiser, noisy, each) for each in (batch, other)]
    assert (different[0] - different[1]).abs().max() > 1e-3


def test_training_and_sampling_shift_the_noise_levels_by_the_number_of_tokens(flux: MakeFlux) -> None:
    # 64 x 96 px are 4 x 6 tokens. By hand: mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (24 - 256).
    mu, family = 0.460729, flux()
    noisy = family.add_noise(torch.zeros(1, 4, 8, 12), sample_indices=[3], seed=1)
    assert noisy.sigmas is not None
    drawn = sample_sigma(distribution_of(NoiseConfig()), shift=1.0, seed=1, sample_index=3)
    assert logit(noisy.sigmas[0]) - logit(drawn) == pytest.approx(mu, abs=1e-5)
    family.load_text_encoders()
    (text,) = family.encode_prompts(["a cat"])
    validation = ValidationConfig(validation_num_inference_steps=2)
    call = family.pipeline_inputs(text, text, validation=validation, size=Size(64, 96))
    assert call["sigmas"] == pytest.approx([1, 1 / (1 + math.exp(-mu))], abs=1e-6)


def test_negative_prompt_is_handed_over_only_for_a_second_pass(flux: MakeFlux) -> None:
    family = flux()
    family.load_text_encoders()
    prompt, negative = family.encode_prompts(["a cat", "blurry"])
    for real in (1.0, 2.0):
        validation = ValidationConfig(validation_guidance_real=real, validation_guidance=4.0)
        call = family.pipeline_inputs(prompt, negative, validation=validation, size=Size(64, 64))
        assert ("negative_prompt_embeds" in call) is (real > 1)
        assert call["true_cfg_scale"] == real
        assert call["guidance_scale"] == 4.0


def test_attention_mask_is_true_for_the_tokens_that_t5_reads(
    flux: MakeFlux, stock: diffusers.FluxPipeline
) -> None:
    family = flux()
    family.load_text_encoders()
    (cat,) = family.encode_prompts(["a photo of a cat"])
    assert cat.attention_mask is not None
    assert cat.attention_mask.shape == (1, 512)
    num_tokens = len(stock.tokenizer_2("a photo of a cat").input_ids)
    assert cat.attention_mask[0].tolist() == [index < num_tokens for index in range(512)]


def test_t5_can_come_from_elsewhere(flux: MakeFlux, tmp_path: Path) -> None:
    save_tiny_flux(tmp_path / "other", seed=9)
    folder = tmp_path / "other" / "text_encoder_2"
    own, swapped = flux(), flux(pretrained_t5_model_name_or_path=str(folder))
    assert swapped.components.text_encoder_2.folder == folder
    assert swapped.text_identity != own.text_identity
    assert swapped.vae_identity == own.vae_identity


def test_kontext_in_a_folder_of_its_own_pipeline_is_read(flux: MakeFlux, tmp_path: Path) -> None:
    save_tiny_flux(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxKontextPipeline"'))
    assert '"FluxKontextPipeline"' in index.read_text()
    for flavour in ("kontext", None):
        assert flux(tmp_path / "model", model_flavour=flavour).components.text_tokens == 512

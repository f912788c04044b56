"""What is Flux.2's alone; test_family_contract.py has what all families share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from scipy.special import logit

from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import ValidationConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.flow_matching import distribution_of, sample_sigma
from simpletuner.helpers.models.registry import specs

Make = Callable[..., ModelFamily]


def test_latents_at_real_size_have_128_channels_at_a_16th_of_the_pixels() -> None:
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLFlux2()
        encoded = vae.encode(torch.zeros(1, 3, 512, 768)).latent_dist.mode()
    assert encoded.shape == (1, 32, 64, 96)
    assert vae.bn.running_mean.shape == (128,)
    assert specs()["flux2"].pixel_alignment == 16


def test_a_tokenizer_without_chat_template_is_explained(make: Make, copied: Callable[[str], Path]) -> None:
    folder = copied("flux2-dev")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=rf"{folder}.*tokenizer has no chat template"):
        make("flux2-dev", folder).load_text_encoders()


def test_a_distilled_klein_is_sampled_without_guidance_and_negative_prompt(make: Make) -> None:
    family = make("flux2-distilled")
    family.load_text_encoders()
    (text,) = family.encode_prompts(["a cat"])
    validation = ValidationConfig(validation_guidance=5.0)
    inputs = family.pipeline_inputs(text, text, validation=validation, size=Size(64, 80))
    assert inputs.keys() == {"prompt_embeds", "guidance_scale", "sigmas"}
    assert inputs["guidance_scale"] == 1.0


def test_training_and_sampling_shift_the_noise_levels_by_the_number_of_tokens(make: Make) -> None:
    # 64 x 80 px are 4 x 5 tokens. By hand, at 50 steps: mu = m10 + 40 / 190 * (m200 - m10), where
    # m10 = 8.73809524e-05 * 20 + 1.89833333 and m200 = 0.00016927 * 20 + 0.45666666.
    mu, family = 1.596917, make("flux2-dev")
    noisy = family.add_noise(torch.zeros(1, 128, 4, 5), sample_indices=[3], seed=1)
    assert noisy.sigmas is not None
    drawn = sample_sigma(distribution_of(NoiseConfig()), shift=1.0, seed=1, sample_index=3)
    assert logit(noisy.sigmas[0]) - logit(drawn) == pytest.approx(mu, abs=1e-5)
    family.load_text_encoders()
    (text,) = family.encode_prompts(["a cat"])
    validation = ValidationConfig(validation_num_inference_steps=2)
    inputs = family.pipeline_inputs(text, text, validation=validation, size=Size(64, 80))
    assert inputs["sigmas"] == pytest.approx([1, 1 / (1 + math.exp(-mu))], abs=1e-6)


def test_flux1s_shift_is_for_training_alone(make: Make) -> None:
    # 20 tokens on Flux.1's line: mu = 0.5 + 0.65 / 3840 * (20 - 256).
    family = make("flux2-dev", noise=NoiseConfig(flux2_training_shift="flux1"))
    noisy = family.add_noise(torch.zeros(1, 128, 4, 5), sample_indices=[3], seed=1)
    assert noisy.sigmas is not None
    drawn = sample_sigma(distribution_of(NoiseConfig()), shift=1.0, seed=1, sample_index=3)
    assert logit(noisy.sigmas[0]) - logit(drawn) == pytest.approx(0.460052, abs=1e-5)
    family.load_text_encoders()
    (text,) = family.encode_prompts(["a cat"])
    validation = ValidationConfig(validation_num_inference_steps=2)
    inputs = family.pipeline_inputs(text, text, validation=validation, size=Size(64, 80))
    assert inputs["sigmas"] == pytest.approx([1, 1 / (1 + math.exp(-1.596917))], abs=1e-6)


def test_make_pipeline_refuses_what_dev_cannot_start_from(make: Make) -> None:
    family = make("flux2-dev")
    with pytest.raises(ModelError, match=r"Flux\.2 dev has no inpaint pipeline, only text2image"):
        family.make_pipeline(family.load_denoiser(), "inpaint")

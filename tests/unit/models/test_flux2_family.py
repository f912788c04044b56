"""What is Flux.2's alone; test_family_contract.py has what all families share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from simpletuner.helpers.configuration.schema.sections import ValidationConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.family import ModelFamily
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


def test_make_pipeline_refuses_what_dev_cannot_start_from(make: Make) -> None:
    family = make("flux2-dev")
    with pytest.raises(ModelError, match=r"Flux\.2 dev has no inpaint pipeline, only text2image"):
        family.make_pipeline(family.load_denoiser(), "inpaint")

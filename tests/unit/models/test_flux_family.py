"""The parts and steps of the Flux.1 family on the tiny model."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from simpletuner.helpers.configuration.schema.sections import (
    ModelConfig,
    NoiseConfig,
    PrecisionConfig,
    ValidationConfig,
)
from simpletuner.helpers.contracts import Batch, NoisyBatch, Sample, Size
from simpletuner.helpers.errors import DataError, ModelError
from simpletuner.helpers.models.flow_matching import timestep_input
from simpletuner.helpers.models.flux.family import Flux, image_ids, pack, unpack
from simpletuner.helpers.models.flux.tiny import save_tiny_flux
from simpletuner.helpers.models.registry import load_family
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl

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
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux.1 dev that no test may change."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_flux(folder)
    return folder


@pytest.fixture
def copied_flux(tiny_flux: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_flux, tmp_path / "copy"))


@pytest.fixture
def flux(tiny_flux: Path) -> MakeFlux:
    """Makes the family on the CPU; keywords change the model's configuration."""

    def make(
        folder: Path = tiny_flux,
        *,
        noise: NoiseConfig | None = None,
        weight_dtype: torch.dtype = torch.float32,
        **changes: object,
    ) -> Flux:
        values = {"model_family": "flux", "pretrained_model_name_or_path": str(folder), **changes}
        return Flux(
            ModelConfig.model_validate(values),
            noise=noise or NoiseConfig(),
            precision=PrecisionConfig(),
            device=torch.device("cpu"),
            weight_dtype=weight_dtype,
        )

    return make


@pytest.fixture(scope="module")
def stock(tiny_flux: Path) -> diffusers.FluxPipeline:
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny_flux)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch_of(family: Flux, prompts: list[str], latents: torch.Tensor) -> Batch:
    family.load_text_encoders()
    text = family.stack_text(family.encode_prompts(prompts))
    return Batch(latents, text, samples=(SAMPLE,) * len(prompts), sample_indices=tuple(range(len(prompts))))


def first_call(stock: diffusers.FluxPipeline, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """What the stock pipeline gives its transformer at the first step, and what comes out."""
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []

    def look(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[torch.Tensor]) -> None:
        assert not args
        seen.append((dict(kwargs), output[0]))

    hook = stock.transformer.register_forward_hook(look, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    stock("a cat", height=64, width=96, num_inference_steps=2, generator=generator, **options)
    hook.remove()
    return seen[0]


def test_registry_knows_the_family() -> None:
    assert load_family("flux") is Flux


def test_pack_is_what_the_pipeline_does_and_unpack_undoes_it(stock: diffusers.FluxPipeline) -> None:
    latents = torch.randn(2, 4, 8, 12)
    tokens = pack(latents)
    assert torch.equal(tokens, stock._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(unpack(tokens, height=4), latents)
    ids = stock._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(4, 6, device=torch.device("cpu")), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_runs_the_transformer_as_the_stock_pipeline_does(
    flux: MakeFlux, tiny_flux: Path, dtype: torch.dtype
) -> None:
    stock = diffusers.FluxPipeline.from_pretrained(tiny_flux, dtype=dtype)
    stock.set_progress_bar_config(disable=True)
    given, expected = first_call(stock, guidance_scale=2.5)
    family = flux(weight_dtype=dtype)
    latents = unpack(given["hidden_states"].float(), height=4)
    noised = NoisyBatch(
        latents=latents,
        target=latents,
        timesteps=(1000,),
        weight=torch.ones(1),
        sigmas=(1.0,),
        guidance=(2.5,),
    )
    found = family.predict(stock.transformer, noised, batch_of(family, ["a cat"], latents))
    assert found.dtype == torch.float32
    assert torch.equal(found, unpack(expected.float(), height=4))


def test_time_is_rounded_as_the_pipeline_rounds_it_in_16_bits() -> None:
    sigmas = torch.linspace(1, 0.001, 200)
    found = timestep_input(sigmas.tolist(), dtype=torch.bfloat16)
    assert torch.equal(found, (sigmas * 1000).to(torch.bfloat16) / 1000)
    assert not torch.equal(found, sigmas.to(torch.bfloat16)), "rounding once is not what pipelines do"


def test_a_batch_is_predicted_as_its_samples_alone(flux: MakeFlux) -> None:
    family = flux()
    denoiser = family.load_denoiser()
    latents = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    batch = batch_of(family, ["a cat", "", "a red dog"], latents)
    together = family.predict(denoiser, family.add_noise(latents, sample_indices=[0, 1, 2], seed=3), batch)
    for index, prompt in enumerate(["a cat", "", "a red dog"]):
        one = latents[index : index + 1]
        alone = family.predict(
            denoiser, family.add_noise(one, sample_indices=[index], seed=3), batch_of(family, [prompt], one)
        )
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_encode_prompts_equals_the_stock_pipeline(flux: MakeFlux, stock: diffusers.FluxPipeline) -> None:
    family = flux()
    family.load_text_encoders()
    with torch.no_grad():
        tokens, pooled, _ = stock.encode_prompt("a photo of a cat")
    (cat,) = family.encode_prompts(["a photo of a cat"])
    assert cat.pooled is not None
    assert cat.attention_mask is not None
    assert torch.equal(cat.prompt_embeds, tokens)
    assert torch.equal(cat.pooled, pooled)
    assert cat.attention_mask.shape == (1, 512)
    assert int(cat.attention_mask.sum()) == len(stock.tokenizer_2("a photo of a cat").input_ids)


@pytest.mark.parametrize(
    ("flavour", "has_guidance", "length"),
    [(None, True, 512), ("krea", True, 512), ("schnell", False, 256), (None, False, 256)],
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
    noised = family.add_noise(torch.zeros(1, 4, 8, 8), sample_indices=[0], seed=1)
    assert (noised.guidance is not None) is has_guidance


def test_encode_prompts_warns_once_of_captions_that_are_cut(
    flux: MakeFlux, caplog: pytest.LogCaptureFixture
) -> None:
    family = flux()
    family.load_text_encoders()
    with caplog.at_level(logging.WARNING, logger="simpletuner"):
        family.encode_prompts(["cat " * 600])
        family.encode_prompts(["dog " * 700])
    (record,) = caplog.records
    assert "has 601 tokens; T5 sees the first 512." in record.getMessage()


def test_encode_images_equals_the_stock_pipeline(tiny_flux: Path, flux: MakeFlux) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stock = diffusers.FluxImg2ImgPipeline.from_pretrained(tiny_flux)
    with torch.no_grad():
        mean = stock.vae.encode(pixels).latent_dist.mode()
    family = flux()
    family.load_vae()
    latents = family.encode_images(pixels)
    assert latents.shape == (2, 4, 8, 12)
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)


def test_encode_images_refuses_what_is_not_finite(flux: MakeFlux) -> None:
    family = flux()
    family.load_vae()
    with pytest.raises(DataError, match="not finite for image 1 of 1"):
        family.encode_images(torch.full((1, 3, 64, 64), float("nan")))


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
        type(batch.text)(
            prompt_embeds=tokens, pooled=batch.text.pooled, attention_mask=batch.text.attention_mask
        ),
        samples=batch.samples,
        sample_indices=batch.sample_indices,
    )
    noised = plain.add_noise(latents, sample_indices=[0], seed=1)
    same = [masked.predict(denoiser, noised, each) for each in (batch, other)]
    torch.testing.assert_close(*same, rtol=1e-5, atol=1e-6)
    different = [plain.predict(denoiser, noised, each) for each in (batch, other)]
    assert (different[0] - different[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("keys", "num_tokens", "shift"),
    [
        ({}, 16, math.exp(0.5 + (16 - 256) * 0.65 / 3840)),
        ({}, 4096, math.exp(1.15)),
        ({"flow_schedule_shift": 3.0}, 16, 3.0),
        ({"flow_schedule_shift": 0}, 16, 1.0),
    ],
)
def test_training_and_pictures_have_the_same_shift(
    flux: MakeFlux, keys: dict[str, object], num_tokens: int, shift: float
) -> None:
    family = flux(noise=NoiseConfig.model_validate(keys))
    edge = 2 * math.isqrt(num_tokens)
    plain = flux(noise=NoiseConfig(flow_schedule_shift=1.0))
    latents = torch.zeros(1, 1, edge, edge)
    (sigma,) = family.add_noise(latents, sample_indices=[5], seed=1).sigmas or ()
    (unshifted,) = plain.add_noise(latents, sample_indices=[5], seed=1).sigmas or ()
    assert sigma == pytest.approx(shift * unshifted / (1 + (shift - 1) * unshifted), rel=1e-6)
    family.load_text_encoders()
    embeds = family.encode_prompts(["a cat"])[0]
    pictures = ValidationConfig(validation_num_inference_steps=2)
    call = family.pipeline_inputs(embeds, embeds, pictures=pictures, size=Size(8 * edge, 8 * edge))
    assert call["sigmas"] == pytest.approx([1.0, shift * 0.5 / (1 + (shift - 1) * 0.5)], rel=1e-6)


def test_negative_prompt_is_handed_over_only_for_a_second_pass(flux: MakeFlux) -> None:
    family = flux()
    family.load_text_encoders()
    prompt, negative = family.encode_prompts(["a cat", "blurry"])
    for real in (1.0, 2.0):
        pictures = ValidationConfig(validation_guidance_real=real, validation_guidance=4.0)
        call = family.pipeline_inputs(prompt, negative, pictures=pictures, size=Size(64, 64))
        assert ("negative_prompt_embeds" in call) is (real > 1)
        assert call["true_cfg_scale"] == real
        assert call["guidance_scale"] == 4.0


def test_a_model_of_another_family_is_refused_by_both_families(
    flux: MakeFlux, tiny_flux: Path, tmp_path: Path
) -> None:
    save_tiny_sdxl(tmp_path / "sdxl")
    with pytest.raises(ModelError, match=r"for StableDiffusionXLPipeline, and Flux\.1 needs one for"):
        flux(tmp_path / "sdxl")
    with pytest.raises(ModelError, match="is a model for FluxPipeline, not for StableDiffusionXL"):
        SDXL(
            ModelConfig(model_family="sdxl", pretrained_model_name_or_path=str(tiny_flux)),
            noise=NoiseConfig(),
            precision=PrecisionConfig(),
            device=torch.device("cpu"),
            weight_dtype=torch.float32,
        )


def test_a_missing_text_encoder_is_named(flux: MakeFlux, copied_flux: Path) -> None:
    shutil.rmtree(copied_flux / "text_encoder_2")
    with pytest.raises(ModelError, match="component text_encoder_2 is missing: there is no folder"):
        flux(copied_flux)


@pytest.mark.parametrize(
    ("part", "changes", "text"),
    [
        ("transformer", {"_class_name": "UNet2DConditionModel"}, "Flux.1 needs FluxTransformer2DModel"),
        ("transformer", {"joint_attention_dim": 64}, "joint_attention_dim of transformer is 64, and the"),
        ("vae", {"latent_channels": 8}, "in_channels of transformer is 16, and the width of a token"),
        ("text_encoder", {"hidden_size": 64}, "pooled_projection_dim of transformer is 32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    flux: MakeFlux, copied_flux: Path, part: str, changes: dict[str, object], text: str
) -> None:
    file = copied_flux / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=text):
        flux(copied_flux)


def test_components_can_be_swapped(flux: MakeFlux, tmp_path: Path, tiny_flux: Path) -> None:
    save_tiny_flux(tmp_path / "other", seed=9)
    own = flux()
    swapped = flux(
        pretrained_transformer_model_name_or_path=str(tmp_path / "other"),
        pretrained_t5_model_name_or_path=str(tmp_path / "other" / "text_encoder_2"),
    )
    assert swapped.text_identity != own.text_identity
    assert swapped.vae_identity == own.vae_identity
    weights = [
        family.load_denoiser().x_embedder.weight for family in (own, swapped, flux(tmp_path / "other"))
    ]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_tiny_model_is_the_same_byte_for_byte(tiny_flux: Path, tmp_path: Path) -> None:
    save_tiny_flux(tmp_path / "again")
    files = sorted(file.relative_to(tiny_flux) for file in tiny_flux.rglob("*") if file.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tiny_flux / file).read_bytes()

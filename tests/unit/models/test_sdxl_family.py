"""The steps of the SDXL family on the tiny model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.helpers.configuration.schema.sections import NoiseConfig, PrecisionConfig
from simpletuner.helpers.contracts import Batch, Sample, Size
from simpletuner.helpers.errors import DataError, ModelError
from simpletuner.helpers.models.diffusion import draw_noise
from simpletuner.helpers.models.sdxl.family import SDXL, time_ids

MakeSDXL = Callable[..., SDXL]
CopySDXL = Callable[[], Path]

SAMPLE = Sample(
    dataset_id="cats",
    path="cat.jpg",
    caption="a cat",
    original_px=Size(300, 451),
    resized_px=Size(64, 96),
    crop_top_left=(3, 17),
    target_px=Size(64, 72),
)


def batch_of(family: SDXL, prompts: list[str]) -> Batch:
    latents = torch.randn(len(prompts), 4, 8, 9, generator=torch.Generator().manual_seed(0))
    text = family.stack_text(family.encode_prompts(prompts))
    return Batch(latents, text, samples=(SAMPLE,) * len(prompts), sample_indices=tuple(range(len(prompts))))


@pytest.fixture(scope="module")
def stock(tiny_sdxl: Path) -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, use_safetensors=True)


def test_time_ids_are_in_the_order_of_diffusers(stock: diffusers.StableDiffusionXLPipeline) -> None:
    expected = stock._get_add_time_ids(
        (300, 451), (3, 17), (64, 72), dtype=torch.float32, text_encoder_projection_dim=32
    )
    assert torch.equal(time_ids([SAMPLE]), expected)
    assert expected.tolist() == [[300, 451, 3, 17, 64, 72]]


def test_encode_prompts_equals_the_stock_pipeline(
    sdxl: MakeSDXL, stock: diffusers.StableDiffusionXLPipeline
) -> None:
    family = sdxl()
    family.load_text_encoders()
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = stock.encode_prompt("a photo of a cat")
    cat, empty = family.encode_prompts(["a photo of a cat", ""])
    assert cat.pooled is not None
    assert empty.pooled is not None
    assert cat.prompt_embeds.shape == (1, 77, 64)
    assert cat.pooled.shape == (1, 32)
    torch.testing.assert_close(cat.prompt_embeds, tokens)
    torch.testing.assert_close(cat.pooled, pooled)
    assert torch.equal(empty.prompt_embeds, negative)
    assert torch.equal(empty.pooled, negative_pooled)
    assert not empty.prompt_embeds.any()


def test_encode_prompts_encodes_the_empty_prompt_when_the_model_says_so(
    sdxl: MakeSDXL, copied_sdxl: CopySDXL, stock: diffusers.StableDiffusionXLPipeline
) -> None:
    folder = copied_sdxl()
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    family = sdxl(folder)
    family.load_text_encoders()
    with torch.no_grad():
        tokens, *_ = stock.encode_prompt("", do_classifier_free_guidance=False)
    torch.testing.assert_close(family.encode_prompts([""])[0].prompt_embeds, tokens)


def test_encode_prompts_gives_float32_on_the_host_from_16_bit_encoders(sdxl: MakeSDXL) -> None:
    family = sdxl(weight_dtype=torch.bfloat16)
    family.load_text_encoders()
    (embeds,) = family.encode_prompts(["a cat"])
    assert embeds.prompt_embeds.dtype == torch.float32
    assert torch.equal(embeds.prompt_embeds, embeds.prompt_embeds.bfloat16().float())
    assert not embeds.prompt_embeds.requires_grad


def test_encode_prompts_warns_once_of_long_captions(
    sdxl: MakeSDXL, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    family = sdxl()
    family.load_text_encoders()
    with caplog.at_level(logging.WARNING):
        family.encode_prompts(["a cat " * 40, "a cat"])
        family.encode_prompts(["a dog " * 400])
    assert [record.getMessage() for record in caplog.records] == [
        "A caption has 82 tokens; the text encoders see the first 77. The rest has no effect, here and in "
        f"other long captions: {('a cat ' * 40)[:80]!r}"
    ]
    assert "".join(capfd.readouterr()) == ""


def test_encode_prompts_refuses_what_is_not_finite(sdxl: MakeSDXL, copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    for weight in weights.values():
        weight[0] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    family = sdxl(folder)
    family.load_text_encoders()
    with pytest.raises(DataError, match=r"not finite for the prompt 'a cat' in torch\.float32"):
        family.encode_prompts(["a cat"])


def test_load_and_unload_may_be_repeated(sdxl: MakeSDXL) -> None:
    family = sdxl()
    for _ in range(2):
        family.load_vae()
        family.load_text_encoders()
    family.unload_text_encoders()
    family.unload_text_encoders()
    family.unload_vae()
    with pytest.raises(AssertionError, match="load_vae comes first"):
        family.encode_images(torch.zeros(1, 3, 64, 64))


def test_load_denoiser_is_frozen_and_in_the_weight_dtype(sdxl: MakeSDXL) -> None:
    denoiser = sdxl(weight_dtype=torch.bfloat16).load_denoiser()
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_encode_images_stays_in_float32_when_the_denoiser_does_not(sdxl: MakeSDXL) -> None:
    pixels = torch.rand(1, 3, 64, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = []
    for dtype in (torch.float32, torch.bfloat16):
        family = sdxl(weight_dtype=dtype)
        family.load_vae()
        latents.append(family.encode_images(pixels))
    assert latents[0].shape == (1, 4, 8, 9)
    assert torch.equal(*latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predict_calls_the_unet_with_its_conditioning(sdxl: MakeSDXL, dtype: torch.dtype) -> None:
    family = sdxl(weight_dtype=dtype)
    family.load_text_encoders()
    denoiser, batch = family.load_denoiser(), batch_of(family, ["a cat", "a dog"])
    noised = family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=4)
    with torch.no_grad():
        prediction = family.predict(denoiser, noised, batch)
        assert batch.text.pooled is not None
        expected = denoiser(
            noised.latents.to(dtype),
            torch.tensor(noised.timesteps),
            encoder_hidden_states=batch.text.prompt_embeds.to(dtype),
            added_cond_kwargs={
                "text_embeds": batch.text.pooled.to(dtype),
                "time_ids": torch.tensor([[300.0, 451, 3, 17, 64, 72]] * 2),
            },
        ).sample
    assert prediction.dtype == torch.float32
    assert torch.equal(prediction, expected.float())


def test_predict_depends_on_caption_size_crop_and_timestep(sdxl: MakeSDXL) -> None:
    family = sdxl()
    family.load_text_encoders()
    denoiser, batch = family.load_denoiser(), batch_of(family, ["a cat"])
    noised = family.add_noise(batch.latents, sample_indices=[0], seed=4)
    moved = Sample("cats", "cat.jpg", "a cat", Size(300, 451), Size(64, 96), (0, 0), Size(64, 72))
    dog = family.stack_text(family.encode_prompts(["a dog"]))
    with torch.no_grad():
        prediction = family.predict(denoiser, noised, batch)
        others = [
            family.predict(denoiser, noised, Batch(batch.latents, batch.text, (moved,), (0,))),
            family.predict(denoiser, noised, Batch(batch.latents, dog, (SAMPLE,), (0,))),
            family.predict(denoiser, family.add_noise(batch.latents, sample_indices=[1], seed=4), batch),
        ]
    assert all(not torch.equal(prediction, other) for other in others)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_add_noise_honours_prediction_type_and_gamma(sdxl: MakeSDXL, prediction_type: str) -> None:
    family = sdxl(prediction_type=prediction_type, noise=NoiseConfig(snr_gamma=5.0))
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = family.add_noise(latents, sample_indices=range(8), seed=0)
    noise = draw_noise(range(8), seed=0, shape=(4, 8, 8))
    assert torch.equal(noised.target, noise) is (prediction_type == "epsilon")
    assert noised.weight.min() < 1


def test_add_noise_leaves_no_signal_at_the_end_of_a_rescaled_schedule(sdxl: MakeSDXL) -> None:
    family = sdxl(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    latents = torch.ones(1, 4, 1, 1)
    # The first position that draws the last timestep.
    position = next(
        each
        for each in range(20000)
        if family.add_noise(latents, sample_indices=[each], seed=0).timesteps == (999,)
    )
    noised = family.add_noise(latents, sample_indices=[position], seed=0)
    assert torch.equal(noised.latents, draw_noise([position], seed=0, shape=(4, 1, 1)))
    assert torch.equal(noised.target, -latents)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae"])
def test_identities_change_with_the_weights(sdxl: MakeSDXL, copied_sdxl: CopySDXL, component: str) -> None:
    folder, original = copied_sdxl(), sdxl()
    stem = "diffusion_pytorch_model" if component == "vae" else "model"
    file = folder / component / f"{stem}.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).add_(1e-3)
    save_file(weights, file, metadata={"format": "pt"})
    changed = sdxl(folder)
    assert (changed.vae_identity == original.vae_identity) is (component != "vae")
    assert (changed.text_identity == original.text_identity) is (component == "vae")


def test_identities_do_not_change_with_the_place(sdxl: MakeSDXL, copied_sdxl: CopySDXL) -> None:
    moved, original = sdxl(copied_sdxl()), sdxl()
    assert moved.vae_identity == original.vae_identity
    assert moved.text_identity == original.text_identity


def test_identities_follow_what_changes_the_result(sdxl: MakeSDXL) -> None:
    original = sdxl()
    half = sdxl(weight_dtype=torch.bfloat16)
    tiled = sdxl(precision=PrecisionConfig(vae_enable_tiling=True))
    assert half.text_identity != original.text_identity
    assert half.vae_identity == original.vae_identity
    assert tiled.vae_identity != original.vae_identity


def test_make_pipeline_refuses_an_unknown_scheduler(sdxl: MakeSDXL) -> None:
    family = sdxl()
    with pytest.raises(ModelError, match=r"'eular' is not known"):
        family.make_pipeline(family.load_denoiser(), scheduler="eular")


def test_row_25_a_repository_that_is_not_cached_is_explained_when_offline(sdxl: MakeSDXL) -> None:
    with pytest.raises(ModelError) as raised:
        sdxl(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0")
    message = str(raised.value)
    assert "pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "stabilityai/stable-diffusion-xl-base-1.0 before that and run: hf auth login" in message

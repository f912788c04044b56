"""The steps of the SDXL family on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.contracts import Batch, Sample, Size, TextEmbeds
from simpletuner.helpers.data.buckets import Placement
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.noising import draw_noise
from simpletuner.helpers.models.sdxl.chunks import encode_chunks
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
    text = TextEmbeds.stack(family.encode_prompts(prompts))
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


def test_the_size_conditioning_of_a_crop_has_file_crop_and_bucket() -> None:
    keys = {"resolution_type": "pixel_area", "resolution": 1024, "crop": True, "crop_style": "center"}
    cases = {
        # sqrt(1280^2 / 6e6) = 0.52255: 1567.7 x 1045.1, of which 544 x 21 are cut off.
        "downsampled": (
            {"maximum_image_size": 1536, "target_downsample_size": 1280},
            [2000, 3000, 10, 272, 1024, 1024],
        ),
        # At an aspect of 2 1448.2 -> 1472 wide, 724.1 -> 704 high; 1472 / 3000 * 2000 = 981.3.
        "closest": (
            {"crop_aspect": "closest", "crop_aspect_buckets": [0.5, 2.0]},
            [2000, 3000, 138, 0, 704, 1472],
        ),
        "random": (
            {"crop_aspect": "random", "crop_aspect_buckets": [0.5]},
            [2000, 3000, 0, 752, 1472, 704],
        ),
    }
    for name, (own, expected) in cases.items():
        config = DatasetConfig(id="x", instance_data_dir=Path.cwd(), **keys, **own)
        found = Cropping(config=config, seed=1, alignment=64, aspect_decimals=2).placement(
            Size(2000, 3000), name="a.png"
        )
        assert isinstance(found, Placement)
        sample = replace(
            SAMPLE,
            original_px=Size(2000, 3000),
            resized_px=found.resized_px,
            crop_top_left=found.top_left,
            target_px=found.target_px,
        )
        assert time_ids([sample]).tolist() == [expected], name


def test_encode_prompts_gives_zeros_of_the_pipelines_shapes_for_the_empty_prompt(sdxl: MakeSDXL) -> None:
    family = sdxl()
    family.load_text_encoders()
    cat, empty = family.encode_prompts(["a photo of a cat", ""])
    assert {name: tensor.shape for name, tensor in cat.tensors().items()} == {
        "tokens": (1, 77, 64),
        "pooled": (1, 32),
    }
    assert not any(tensor.any() for tensor in empty.tensors().values())
    assert all(tensor.any() for tensor in cat.tensors().values())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predict_calls_the_unet_with_its_conditioning(sdxl: MakeSDXL, dtype: torch.dtype) -> None:
    family = sdxl(weight_dtype=dtype)
    family.load_text_encoders()
    denoiser, batch = family.load_denoiser(), batch_of(family, ["a cat", "a dog"])
    noisy = family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=4)
    with torch.no_grad():
        prediction = family.predict(denoiser, noisy, batch)
        assert batch.text.pooled is not None
        expected = denoiser(
            noisy.latents.to(dtype),
            torch.tensor(noisy.timesteps),
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
    noisy = family.add_noise(batch.latents, sample_indices=[0], seed=4)
    moved = Sample("cats", "cat.jpg", "a cat", Size(300, 451), Size(64, 96), (0, 0), Size(64, 72))
    dog = TextEmbeds.stack(family.encode_prompts(["a dog"]))
    with torch.no_grad():
        prediction = family.predict(denoiser, noisy, batch)
        others = [
            family.predict(denoiser, noisy, Batch(batch.latents, batch.text, (moved,), (0,))),
            family.predict(denoiser, noisy, Batch(batch.latents, dog, (SAMPLE,), (0,))),
            family.predict(denoiser, family.add_noise(batch.latents, sample_indices=[1], seed=4), batch),
        ]
    assert all(not torch.equal(prediction, other) for other in others)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_add_noise_honours_prediction_type_and_gamma(sdxl: MakeSDXL, prediction_type: str) -> None:
    family = sdxl(prediction_type=prediction_type, noise=NoiseConfig(snr_gamma=5.0))
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = family.add_noise(latents, sample_indices=range(8), seed=0)
    noise = draw_noise(range(8), seed=0, shape=(4, 8, 8))
    assert torch.equal(noisy.target, noise) is (prediction_type == "epsilon")
    assert noisy.weight.min() < 1


def test_add_noise_leaves_no_signal_at_the_end_of_a_rescaled_schedule(sdxl: MakeSDXL) -> None:
    family = sdxl(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    latents = torch.ones(1, 4, 1, 1)
    # The first position that draws the last timestep.
    position = next(
        each
        for each in range(20000)
        if family.add_noise(latents, sample_indices=[each], seed=0).timesteps == (999,)
    )
    noisy = family.add_noise(latents, sample_indices=[position], seed=0)
    assert torch.equal(noisy.latents, draw_noise([position], seed=0, shape=(4, 1, 1)))
    assert torch.equal(noisy.target, -latents)


def test_make_pipeline_refuses_an_unknown_scheduler(sdxl: MakeSDXL) -> None:
    family = sdxl()
    with pytest.raises(ModelError, match=r"'eular'"):
        family.make_pipeline(family.load_denoiser(), scheduler="eular")


@pytest.mark.reliability_row(25)
def test_a_repository_that_is_not_cached_is_explained_when_offline(sdxl: MakeSDXL) -> None:
    with pytest.raises(ModelError) as raised:
        sdxl(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0")
    message = str(raised.value)
    assert "pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "/stabilityai/stable-diffusion-xl-base-1.0 and run: hf auth login" in message


LONG = " ".join(["cat", "a", "b"] * 34)
"""Each word is a token."""


def test_a_prompt_of_one_chunk_is_encoded_as_by_the_stock_pipeline(sdxl: MakeSDXL) -> None:
    family = sdxl()
    family.load_text_encoders()
    for prompt in ("a photo of a cat", LONG):
        (stock,) = family.encode_prompts([prompt])
        with torch.no_grad():
            text, pooled = encode_chunks(
                family.prompt_encoder, prompt, num_chunks=1, device=torch.device("cpu")
            )
        assert torch.equal(text, stock.prompt_embeds)
        assert torch.equal(pooled, stock.pooled)


def test_each_chunk_of_a_long_prompt_is_encoded_as_a_prompt_of_its_own(sdxl: MakeSDXL) -> None:
    one, family = sdxl(), sdxl(max_token_length=225)
    one.load_text_encoders()
    family.load_text_encoders()
    words = one.prompt_encoder.tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(words) == 102
    tokenizer = one.prompt_encoder.tokenizer
    parts = [tokenizer.decode(words[:75]), tokenizer.decode(words[75:150]), " "]
    for part, own in zip(parts, (words[:75], words[75:150], []), strict=True):
        assert tokenizer(part, add_special_tokens=False).input_ids == own
    expected = one.encode_prompts(parts)
    (found,) = family.encode_prompts([LONG])
    torch.testing.assert_close(found.prompt_embeds, torch.cat([each.prompt_embeds for each in expected], 1))
    torch.testing.assert_close(found.pooled, expected[0].pooled)


def test_prompts_in_chunks_have_one_length_and_train(
    sdxl: MakeSDXL, caplog: pytest.LogCaptureFixture
) -> None:
    family = sdxl(max_token_length=150)
    family.load_text_encoders()
    batch = batch_of(family, ["a cat", LONG, ""])
    assert batch.text.prompt_embeds.shape == (3, 154, 64)
    assert not batch.text.prompt_embeds[2].any()
    assert not batch.text.pooled[2].any()
    noisy = family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=4)
    assert family.predict(family.load_denoiser(), noisy, batch).shape == batch.latents.shape
    assert not caplog.records
    family.encode_prompts([LONG + LONG])
    assert "first 152" in caplog.text


def test_the_number_of_chunks_is_in_the_identity_of_prompt_embeds(sdxl: MakeSDXL) -> None:
    identities = [sdxl(max_token_length=length).text_identity for length in (75, 150, 225)]
    assert len(set(identities)) == 3
    assert identities[0] == sdxl().text_identity
    assert "chunks" not in identities[0], "prompt embeds of earlier versions stay valid"

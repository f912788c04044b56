"""The bundled SDXL pipelines without an adapter: bit for bit what diffusers' own give."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig, ValidationConfig
from simpletuner.helpers.contracts import PipelineType, Size, TextEmbeds
from simpletuner.helpers.models.family import FamilyContext
from simpletuner.helpers.models.sdxl import pipeline as bundled
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl

MakeSDXL = Callable[[torch.dtype], SDXL]
STOCK: dict[PipelineType, type[diffusers.DiffusionPipeline]] = {
    "text2image": diffusers.StableDiffusionXLPipeline,
    "image2image": diffusers.StableDiffusionXLImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionXLInpaintPipeline,
}
BUNDLED: dict[PipelineType, type[diffusers.DiffusionPipeline]] = {
    "text2image": bundled.StableDiffusionXLPipeline,
    "image2image": bundled.StableDiffusionXLImg2ImgPipeline,
    "inpaint": bundled.StableDiffusionXLInpaintPipeline,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_sdxl(folder)
    return folder


@pytest.fixture
def make_family(model: Path) -> MakeSDXL:
    def make(weight_dtype: torch.dtype) -> SDXL:
        config = {"model_family": "sdxl", "pretrained_model_name_or_path": str(model)}
        return SDXL(
            FamilyContext(
                model=ModelConfig.model_validate(config),
                noise=NoiseConfig(),
                precision=PrecisionConfig(),
                device=torch.device("cpu"),
                weight_dtype=weight_dtype,
            )
        )

    return make


def picture(kind: Literal["RGB", "L"]) -> Image.Image:
    shape = (64, 64, 3) if kind == "RGB" else (64, 64)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs(kind: PipelineType) -> dict[str, object]:
    common: dict[str, object] = {"num_inference_steps": 4, "output_type": "np"}
    if kind == "text2image":
        return common | {"height": 64, "width": 72}
    if kind == "image2image":
        return common | {"image": picture("RGB"), "strength": 0.6}
    return common | {
        "image": picture("RGB"),
        "mask_image": picture("L"),
        "strength": 0.8,
        "height": 64,
        "width": 64,
    }


def sample(pipeline: diffusers.DiffusionPipeline, **arguments: object) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(generator=torch.Generator().manual_seed(0), **arguments).images
    return images


def call_of(
    family: SDXL, prompt: TextEmbeds, negative: TextEmbeds, *, guidance: float = 5.0
) -> dict[str, object]:
    """What the family adds to the call."""
    pictures = ValidationConfig(validation_guidance=guidance)
    return family.pipeline_inputs(prompt, negative, validation=pictures, size=Size(64, 64))


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize(
    "call",
    [
        {"prompt": "a cat"},
        {"prompt": "a cat", "guidance_scale": 1.0},
        {"prompt": ["a cat", "a dog"], "negative_prompt": ["blue", "red"], "guidance_scale": 3.0},
        {"prompt": "a cat", "num_images_per_prompt": 2, "guidance_rescale": 0.7},
    ],
    ids=["plain", "no-guidance", "two-prompts", "two-images-rescaled"],
)
def test_bundled_pipeline_loaded_from_a_folder_equals_the_stock_one(
    model: Path, kind: PipelineType, call: dict[str, object]
) -> None:
    if kind != "text2image":
        call = {name: value for name, value in call.items() if name != "guidance_rescale"}
    stock, own = (
        pipelines[kind].from_pretrained(model, use_safetensors=True, add_watermarker=False)
        for pipelines in (STOCK, BUNDLED)
    )
    expected = sample(stock, **inputs(kind), **call)
    assert expected.std() > 0.01
    assert np.array_equal(sample(own, **inputs(kind), **call), expected)


@pytest.mark.parametrize("kind", STOCK)
def test_the_pipeline_of_the_family_equals_the_stock_one(
    model: Path, make_family: MakeSDXL, kind: PipelineType
) -> None:
    family = make_family(torch.float32)
    family.load_text_encoders()
    prompt, negative = (family.encode_prompts([text])[0] for text in ("a cat", ""))
    family.unload_text_encoders()
    pipeline = family.make_pipeline(family.load_denoiser(), kind)
    assert type(pipeline) is BUNDLED[kind]
    assert pipeline.watermark is None
    guidance = 7.5 if kind == "inpaint" else 5.0  # what diffusers takes when it is given none
    found = sample(pipeline, **inputs(kind), **call_of(family, prompt, negative, guidance=guidance))
    stock = STOCK[kind].from_pretrained(model, use_safetensors=True, add_watermarker=False)
    assert np.array_equal(found, sample(stock, **inputs(kind), prompt="a cat"))


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_pipeline_leaves_the_vae_as_it_was(
    make_family: MakeSDXL, kind: PipelineType, dtype: torch.dtype
) -> None:
    family = make_family(dtype)
    family.load_text_encoders()
    prompt, negative = (family.encode_prompts([text])[0] for text in ("a cat", ""))
    family.load_vae()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    pipeline = family.make_pipeline(family.load_denoiser(), kind)
    images = sample(pipeline, **inputs(kind), **call_of(family, prompt, negative))
    assert np.isfinite(images).all()
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.float32}
    assert torch.equal(family.encode_images(pixels), latents)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_named_sampler_runs_and_gives_its_own_picture(make_family: MakeSDXL, name: str) -> None:
    family = make_family(torch.float32)
    family.load_text_encoders()
    prompt, negative = (family.encode_prompts([text])[0] for text in ("a cat", ""))
    denoiser = family.load_denoiser()
    text = call_of(family, prompt, negative)
    named, own = (
        sample(family.make_pipeline(denoiser, scheduler=scheduler), **inputs("text2image"), **text)
        for scheduler in (name, None)
    )
    assert np.isfinite(named).all()
    assert np.array_equal(named, own) is (name == "euler")


def test_make_pipeline_uses_the_very_denoiser_it_is_given(make_family: MakeSDXL) -> None:
    family = make_family(torch.float32)
    denoiser = family.load_denoiser()
    first, second = family.make_pipeline(denoiser), family.make_pipeline(denoiser, "inpaint")
    assert first.unet is denoiser
    assert second.unet is denoiser
    assert first.vae is second.vae
    assert first.scheduler is not second.scheduler


def test_the_pipeline_draws_no_progress_bar(make_family: MakeSDXL, capfd: pytest.CaptureFixture[str]) -> None:
    family = make_family(torch.float32)
    family.load_text_encoders()
    embeds = family.encode_prompts(["a cat"])[0]
    pipeline = family.make_pipeline(family.load_denoiser())
    pipeline(**call_of(family, embeds, embeds), height=64, width=64, num_inference_steps=1)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("kind", BUNDLED)
def test_bundled_pipeline_is_called_with_the_arguments_of_its_diffusers_class(kind: PipelineType) -> None:
    assert inspect.signature(BUNDLED[kind].__call__) == inspect.signature(STOCK[kind].__call__)
    assert len(inspect.signature(BUNDLED[kind].__call__).parameters) > 20

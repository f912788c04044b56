"""The steps of the Flux.2 family on the tiny models, against diffusers' own pipelines."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.helpers.configuration.schema.sections import NoiseConfig, PrecisionConfig, ValidationConfig
from simpletuner.helpers.contracts import Batch, NoisyBatch, Sample, Size
from simpletuner.helpers.errors import DataError, ModelError
from simpletuner.helpers.models.flux2.family import Flux2

MakeFlux2 = Callable[..., Flux2]
Flux2Folder = Callable[[str], Path]

KINDS = ["dev", "klein"]
SIZE = Size(64, 80)
SAMPLE = Sample(
    dataset_id="cats",
    path="cat.jpg",
    caption="a cat",
    original_px=Size(300, 451),
    resized_px=Size(64, 96),
    crop_top_left=(0, 8),
    target_px=SIZE,
)


@pytest.fixture(scope="module")
def stock(tiny_flux2: Flux2Folder) -> Callable[..., Any]:
    def load(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_flux2(kind), dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_latents(num: int = 1) -> torch.Tensor:
    return torch.randn(num, 16, 4, 5, generator=torch.Generator().manual_seed(0))


def batch_of(family: Flux2, prompts: list[str]) -> Batch:
    family.load_text_encoders()
    text = family.stack_text(family.encode_prompts(prompts))
    num = len(prompts)
    return Batch(random_latents(num), text, samples=(SAMPLE,) * num, sample_indices=tuple(range(num)))


@pytest.mark.parametrize("kind", KINDS)
def test_encode_images_equals_the_stock_pipeline(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, stock: Callable[..., Any], kind: str
) -> None:
    family = flux2(tiny_flux2(kind))
    family.load_vae()
    latents = family.encode_images(pixels())
    assert latents.shape == (2, 16, 4, 5)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        expected = stock(kind)._encode_vae_image(pixels(), None)
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)


def test_encode_images_stays_in_float32_when_the_denoiser_does_not(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder
) -> None:
    latents = []
    for dtype in (torch.float32, torch.bfloat16):
        family = flux2(tiny_flux2("klein"), weight_dtype=dtype)
        family.load_vae()
        latents.append(family.encode_images(pixels()))
    assert torch.equal(*latents)


def test_encode_images_refuses_what_is_not_finite(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    family, broken = flux2(tiny_flux2("klein")), pixels()
    broken[1, 0, 0, 0] = float("nan")
    family.load_vae()
    with pytest.raises(DataError, match="image 2 of 2"):
        family.encode_images(broken)


def test_latents_at_real_size_have_128_channels_at_a_16th_of_the_pixels(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder
) -> None:
    family = flux2(tiny_flux2("klein"))
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLFlux2()
        encoded = vae.encode(torch.zeros(1, 3, 512, 768)).latent_dist.mode()
    assert encoded.shape == (1, 32, 64, 96)
    assert vae.bn.running_mean.shape == (128,)
    assert family.spec.pixel_alignment == 16


@pytest.mark.parametrize("kind", KINDS)
def test_encode_prompts_equals_the_stock_pipeline(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, stock: Callable[..., Any], kind: str
) -> None:
    family = flux2(tiny_flux2(kind))
    family.load_text_encoders()
    for prompt in ("a photo of a cat", ""):
        with torch.no_grad():
            expected, _ = stock(kind).encode_prompt(prompt)
        (found,) = family.encode_prompts([prompt])
        assert found.prompt_embeds.shape == (1, 512, 48)
        assert torch.equal(found.prompt_embeds, expected)
    together = family.encode_prompts(["a photo of a cat", ""])
    torch.testing.assert_close(together[1].prompt_embeds, found.prompt_embeds)


def test_encode_prompts_keeps_the_precision_of_the_encoder(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    family = flux2(tiny_flux2("klein"), weight_dtype=torch.bfloat16)
    family.load_text_encoders()
    (embeds,) = family.encode_prompts(["a cat"])
    assert embeds.prompt_embeds.dtype == torch.bfloat16
    assert embeds.prompt_embeds.is_contiguous()
    assert not embeds.prompt_embeds.requires_grad


@pytest.mark.parametrize(("kind", "around"), [("klein", 34), ("dev", 129)])
def test_encode_prompts_warns_once_of_long_captions(
    flux2: MakeFlux2,
    tiny_flux2: Flux2Folder,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    around: int,
) -> None:
    family = flux2(tiny_flux2(kind))
    family.load_text_encoders()
    fitting, long = ("a" + " cat" * (512 - around - 1 + extra) for extra in (0, 1))
    with caplog.at_level(logging.WARNING):
        family.encode_prompts([fitting])
        assert not caplog.records
        family.encode_prompts(["a cat", long])
        family.encode_prompts([long + " cat"])
    assert [record.getMessage() for record in caplog.records] == [
        "A caption has 513 tokens; with the conversation around it, the text encoder sees the first 512. "
        f"The rest has no effect, here and in other long captions: {long[:80]!r}"
    ]


def test_encode_prompts_refuses_what_is_not_finite(flux2: MakeFlux2, copied_flux2: Flux2Folder) -> None:
    folder = copied_flux2("klein")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"].fill_(float("inf"))
    save_file(weights, file, metadata={"format": "pt"})
    family = flux2(folder)
    family.load_text_encoders()
    with pytest.raises(DataError, match=r"not finite for the prompt 'a cat' in torch\.float32"):
        family.encode_prompts(["a cat"])


def test_a_tokenizer_without_chat_template_is_explained(flux2: MakeFlux2, copied_flux2: Flux2Folder) -> None:
    folder = copied_flux2("dev")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"tokenizer has no chat template.*Fetch the model again"):
        flux2(folder).load_text_encoders()


def test_load_and_unload_may_be_repeated(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    family = flux2(tiny_flux2("klein"))
    for _ in range(2):
        family.load_vae()
        family.load_text_encoders()
    for _ in range(2):
        family.unload_vae()
        family.unload_text_encoders()
    with pytest.raises(AssertionError, match="load_vae comes first"):
        family.encode_images(pixels())


def first_call(pipeline: Any, **arguments: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """What a pipeline calls its transformer with in the first step, and what comes of it."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []

    def look(_: object, __: object, given: dict[str, Any], result: tuple[torch.Tensor]) -> None:
        calls.append((given, result[0]))

    handle = pipeline.transformer.register_forward_hook(look, with_kwargs=True)
    pipeline(height=64, width=80, num_inference_steps=2, output_type="latent", **arguments)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_is_the_stock_pipelines_call_of_the_transformer(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, stock: Callable[..., Any], kind: str, dtype: torch.dtype
) -> None:
    family = flux2(tiny_flux2(kind), weight_dtype=dtype)
    batch = batch_of(family, ["a cat"])
    pipeline = stock(kind, dtype)
    pipeline.scheduler.register_to_config(use_dynamic_shifting=False)
    pipeline.scheduler.set_shift(1.0)
    sigma = 0.8180538415908813
    given, expected = first_call(
        pipeline, prompt="a cat", latents=batch.latents, guidance_scale=2.5, sigmas=[sigma, 0.25]
    )
    guidance = (2.5,) if kind == "dev" else None
    noised = NoisyBatch(batch.latents, batch.latents, (818,), torch.ones(1), (sigma,), guidance)
    with torch.no_grad():
        calls: list[dict[str, Any]] = []
        denoiser = family.load_denoiser()
        denoiser.register_forward_pre_hook(lambda _, __, called: calls.append(called), with_kwargs=True)
        prediction = family.predict(denoiser, noised, batch)
    for name, own in calls[0].items():
        if isinstance(own, torch.Tensor):
            assert torch.equal(own, given[name]), name
        else:
            assert own == given[name], name
    assert prediction.dtype == torch.float32
    assert torch.equal(prediction.flatten(2).transpose(1, 2), expected.float())


@pytest.mark.parametrize("kind", KINDS)
def test_predict_of_a_batch_is_each_samples_own(flux2: MakeFlux2, tiny_flux2: Flux2Folder, kind: str) -> None:
    family = flux2(tiny_flux2(kind), noise=NoiseConfig(flux_guidance_mode="random-range"))
    batch = batch_of(family, ["a cat", "a dog"])
    noised, denoiser = family.add_noise(batch.latents, sample_indices=[5, 6], seed=1), family.load_denoiser()
    with torch.no_grad():
        together = family.predict(denoiser, noised, batch)
        for index, position in enumerate((5, 6)):
            text = family.stack_text(family.encode_prompts([("a cat", "a dog")[index]]))
            alone = Batch(batch.latents[index : index + 1], text, (SAMPLE,), (position,))
            one = family.add_noise(alone.latents, sample_indices=[position], seed=1)
            torch.testing.assert_close(
                family.predict(denoiser, one, alone), together[index : index + 1], rtol=1e-4, atol=1e-5
            )


def test_predict_gradients_reach_the_latents(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    family = flux2(tiny_flux2("klein"))
    batch = batch_of(family, ["a cat"])
    latents = batch.latents.clone().requires_grad_()
    noised = NoisyBatch(latents, latents, (500,), torch.ones(1), (0.5,))
    family.predict(family.load_denoiser(), noised, batch).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("size", "steps_mu"),
    [
        # By hand: 4096 tokens lie between mu 2.25622 at 10 steps and 1.15 at 200, so 50 steps give 2.02332;
        # 20 tokens likewise between 1.90008 and 0.46004; above 4300 tokens mu is 0.00016927 n + 0.45666666.
        (Size(1024, 1024), 2.02332),
        (Size(64, 80), 1.59691),
        (Size(1280, 1280), 0.00016927 * 6400 + 0.45666666),
    ],
)
def test_the_shift_is_the_pipelines_own_at_50_steps(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, size: Size, steps_mu: float
) -> None:
    family = flux2(tiny_flux2("klein"))
    text = batch_of(family, ["a cat"]).text
    pictures = ValidationConfig(validation_num_inference_steps=2)
    first, second = family.pipeline_inputs(text, text, pictures=pictures, size=size)["sigmas"]
    assert first == 1.0
    # At sigma 0.5 a shift s gives s / (s + 1).
    assert second == pytest.approx(1 / (1 + math.exp(-steps_mu)), abs=1e-5)


@pytest.mark.parametrize(
    "noise",
    [NoiseConfig(), NoiseConfig(flow_schedule_shift=3.0), NoiseConfig(flow_schedule_auto_shift=True)],
    ids=["model's", "static", "auto"],
)
def test_training_and_pictures_share_one_shift(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, noise: NoiseConfig
) -> None:
    family = flux2(tiny_flux2("klein"), noise=noise)
    plain = flux2(tiny_flux2("klein"), noise=NoiseConfig(flow_schedule_shift=1.0))
    (sigma,) = family.add_noise(random_latents(), sample_indices=[3], seed=1).sigmas or ()
    (unshifted,) = plain.add_noise(random_latents(), sample_indices=[3], seed=1).sigmas or ()
    shift = sigma * (1 - unshifted) / (unshifted * (1 - sigma))
    text = batch_of(family, ["a cat"]).text
    pictures = ValidationConfig(validation_num_inference_steps=2)
    for steps in (2, 4, 50):
        pictures = ValidationConfig(validation_num_inference_steps=steps)
        sigmas = family.pipeline_inputs(text, text, pictures=pictures, size=SIZE)["sigmas"]
        middle = sigmas[steps // 2]
        assert middle == pytest.approx(shift / (1 + shift), rel=1e-5)


def test_add_noise_moves_from_the_image_to_the_noise(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    family = flux2(tiny_flux2("klein"))
    latents = random_latents(3)
    noised = family.add_noise(latents, sample_indices=[4, 5, 6], seed=2)
    assert noised.sigmas is not None
    assert noised.guidance is None
    assert noised.timesteps == tuple(int(torch.tensor(each) * 1000) for each in noised.sigmas)
    sigma = torch.tensor(noised.sigmas)[:, None, None, None]
    torch.testing.assert_close(noised.latents - sigma * noised.target, latents)


def test_add_noise_tells_dev_the_guidance_of_the_configuration(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder
) -> None:
    family = flux2(tiny_flux2("dev"), noise=NoiseConfig(flux_guidance_value=3.0))
    assert family.add_noise(random_latents(2), sample_indices=[0, 1], seed=0).guidance == (3.0, 3.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dev", {"prompt_embeds", "guidance_scale", "sigmas"}),
        ("klein", {"prompt_embeds", "negative_prompt_embeds", "guidance_scale", "sigmas"}),
        ("distilled", {"prompt_embeds", "guidance_scale", "sigmas"}),
    ],
)
def test_pipeline_inputs_are_what_the_kind_can_use(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, kind: str, expected: set[str]
) -> None:
    family = flux2(tiny_flux2(kind))
    text = batch_of(family, ["a cat"]).text
    pictures = ValidationConfig(validation_guidance=5.0)
    inputs = family.pipeline_inputs(text, text, pictures=pictures, size=SIZE)
    assert inputs.keys() == expected
    assert inputs["guidance_scale"] == (1.0 if kind == "distilled" else 5.0)


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder", "vae"])
def test_identities_change_with_the_content(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, copied_flux2: Flux2Folder, component: str
) -> None:
    folder, original = copied_flux2("klein"), flux2(tiny_flux2("klein"))
    if component == "tokenizer":
        template = folder / component / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    else:
        (file,) = (folder / component).glob("*.safetensors")
        weights = load_file(file)
        next(weight for weight in weights.values() if weight.is_floating_point()).add_(1e-3)
        save_file(weights, file, metadata={"format": "pt"})
    changed = flux2(folder)
    assert (changed.vae_identity == original.vae_identity) is (component != "vae")
    assert (changed.text_identity == original.text_identity) is (component == "vae")


def test_identities_follow_what_changes_the_result_and_not_the_place(
    flux2: MakeFlux2, tiny_flux2: Flux2Folder, copied_flux2: Flux2Folder
) -> None:
    original, moved = flux2(tiny_flux2("klein")), flux2(copied_flux2("klein"))
    half = flux2(tiny_flux2("klein"), weight_dtype=torch.bfloat16)
    tiled = flux2(tiny_flux2("klein"), precision=PrecisionConfig(vae_enable_tiling=True))
    assert (moved.vae_identity, moved.text_identity) == (original.vae_identity, original.text_identity)
    assert half.text_identity != original.text_identity
    assert half.vae_identity == original.vae_identity
    assert tiled.vae_identity != original.vae_identity


def test_load_denoiser_is_frozen_and_in_the_weight_dtype(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    denoiser = flux2(tiny_flux2("dev"), weight_dtype=torch.bfloat16).load_denoiser()
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_make_pipeline_refuses_what_dev_cannot_start_from(flux2: MakeFlux2, tiny_flux2: Flux2Folder) -> None:
    family = flux2(tiny_flux2("dev"))
    with pytest.raises(ModelError, match=r"Flux\.2 dev has no pipeline of the kind inpaint, only text2image"):
        family.make_pipeline(family.load_denoiser(), "inpaint")

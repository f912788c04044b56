"""Reference images in the denoiser's call: of training, and of the bundled pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import ValidationConfig
from simpletuner.helpers.configuration.schema.token_routing import TreadConfig
from simpletuner.helpers.contracts import Batch, NoisyBatch, Size, TextEmbeds
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.flux.pipeline import FluxKontextPipeline
from simpletuner.helpers.models.flux.tokens import unpack
from simpletuner.helpers.models.flux2.latents import from_tokens
from simpletuner.helpers.models.flux2.pipeline import Flux2KleinPipeline, Flux2Pipeline
from simpletuner.helpers.models.token_routing import TokenRouting
from tests.integration.attached import attach_tlora
from tests.unit.models.family_cases import GUIDANCE, SAMPLE, SIGMA, SIZE

Make = Callable[..., ModelFamily]
ROWS = SIZE.height // 16
NUM_NOISY = SIZE.height * SIZE.width // 16**2
FIRST, SECOND = Size(64, 80), Size(96, 64)
"""Sizes of references: that of the image, and another."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@dataclass(frozen=True)
class Case:
    """A tiny model and the bundled pipeline that takes reference images."""

    name: str
    pipeline: Any
    options: Mapping[str, Any]
    """Arguments of its call beside the images."""
    unpacked: Callable[[Tensor], Tensor]
    has_guidance: bool

    def __str__(self) -> str:
        return self.name


_KEPT = {"max_area": SIZE.height * SIZE.width, "_auto_resize": False}
CASES = (
    Case("flux", FluxKontextPipeline, _KEPT, lambda tokens: unpack(tokens, height=ROWS), True),
    Case("flux2-dev", Flux2Pipeline, {}, lambda tokens: from_tokens(tokens, height=ROWS), True),
    Case("flux2-klein", Flux2KleinPipeline, {}, lambda tokens: from_tokens(tokens, height=ROWS), False),
)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def pixels_of(size: Size, seed: int = 0) -> Tensor:
    """[3, H, W] in [-1, 1], as 8-bit colours give them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, size.height, size.width), generator=generator) / 127.5 - 1


def image_of(pixels: Tensor) -> Image.Image:
    image: Image.Image = VaeImageProcessor().postprocess(pixels[None])[0]
    return image


def first_call(pipeline: Any, **arguments: Any) -> tuple[dict[str, Any], Tensor]:
    """What a pipeline calls its transformer with in the first step, and the output."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    handle = pipeline.transformer.register_forward_hook(
        lambda _, __, options, output: calls.append((options, output[0])), with_kwargs=True
    )
    pipeline(
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **arguments,
    )
    handle.remove()
    return calls[0]


def batch_of(
    family: ModelFamily, latents: Tensor, references: Sequence[Tensor], prompts: Sequence[str] = ("a cat",)
) -> Batch:
    family.load_text_encoders()
    text = TextEmbeds.stack(family.encode_prompts(prompts))
    return Batch(
        latents,
        text,
        samples=(SAMPLE,) * len(latents),
        sample_indices=tuple(range(len(latents))),
        references=tuple(references),
    )


def noisy_of(case: Case, latents: Tensor) -> NoisyBatch:
    sigmas = (SIGMA,) * len(latents)
    guidance = (GUIDANCE,) * len(latents) if case.has_guidance else None
    timesteps = (int(1000 * SIGMA),) * len(latents)
    return NoisyBatch(latents, latents, timesteps, torch.ones(len(latents)), sigmas, guidance)


def latents_of(case: Case, size: Size, seed: int, num: int = 1) -> Tensor:
    channels, step = (4, 8) if case.name == "flux" else (16, 16)
    shape = (num, channels, size.height // step, size.width // step)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_same_call(
    family: ModelFamily,
    case: Case,
    denoiser: nn.Module,
    given: Mapping[str, Any],
    expected: Tensor,
    references: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Feed the pipeline's inputs through predict; compare the transformer's inputs and the prediction."""
    noisy = noisy_of(case, case.unpacked(given["hidden_states"][:, :NUM_NOISY].float()))
    ours: list[dict[str, Any]] = []
    handle = denoiser.register_forward_pre_hook(lambda _, __, options: ours.append(options), with_kwargs=True)
    with torch.no_grad():
        prediction = family.predict(denoiser, noisy, batch_of(family, noisy.latents, references))
    handle.remove()
    tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
    # Flux.2's pipeline gives guidance to every model; one without an embedding takes none.
    tensors -= set() if case.has_guidance else {"guidance"}
    assert {"hidden_states", "img_ids", "timestep", "encoder_hidden_states"} <= tensors
    # A reference is encoded from pixels that differ by a rounding; in 16 bits it may fall to the next number.
    loose = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for name in tensors:
        found, wanted = ours[0][name].float(), given[name].float().expand(ours[0][name].shape)
        torch.testing.assert_close(found, wanted, **loose)
        if name == "hidden_states":
            found, wanted = found[:, :NUM_NOISY], wanted[:, :NUM_NOISY]
        assert torch.equal(found, wanted), name
    assert prediction.shape == noisy.latents.shape
    torch.testing.assert_close(prediction, case.unpacked(expected[:, :NUM_NOISY].float()), **loose)


def prepared(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    """The bundled pipeline, whose scheduler leaves sigmas as they are."""
    pipeline = case.pipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipeline


@EVERY_CASE
@DTYPES
def test_predict_calls_the_denoiser_as_the_bundled_pipeline_does(
    make: Make, tiny: Callable[[str], Path], case: Case, dtype: torch.dtype
) -> None:
    pipeline, family = prepared(case, tiny(case.name), dtype), make(case.name, weight_dtype=dtype)
    family.load_vae()
    pipeline.vae = family.vae
    # diffusers' Kontext takes one reference.
    pixels = [pixels_of(FIRST), pixels_of(SECOND, 1)][: 1 if case.name == "flux" else 2]
    references = [family.encode_images(each[None]) for each in pixels]
    options = {"guidance_scale": GUIDANCE, "sigmas": [SIGMA, 0.25], **case.options}
    # diffusers' Kontext leaves the latents of a float32 VAE in float32 beside noise in 16 bits, and fails.
    is_encoded = case.name == "flux" and dtype == torch.bfloat16
    image: Any = references[0] if is_encoded else list(map(image_of, pixels))
    given, expected = first_call(pipeline, prompt="a cat", image=image, **options)
    assert given["hidden_states"].shape[1] == NUM_NOISY + sum(
        each.shape[1] * each.shape[2] // 16**2 for each in pixels
    )
    check_same_call(family, case, pipeline.transformer, given, expected, references, dtype)


@EVERY_CASE
def test_predict_calls_the_denoiser_as_the_pipeline_of_validation_does(make: Make, case: Case) -> None:
    # Masked attention must cover the references; Flux.2 has no such mask.
    noise = NoiseConfig(flux_attention_masked_training=case.name == "flux", flow_schedule_shift=1.0)
    family = make(case.name, noise=noise)
    family.load_text_encoders()
    pipeline: Any = family.make_pipeline(family.load_denoiser(), "edit")
    (text,) = family.encode_prompts(["a cat"])
    pixels = [pixels_of(Size(32, 304)), pixels_of(SECOND, 1)]  # diffusers would refuse the first
    inputs = family.pipeline_inputs(
        text,
        text,
        validation=ValidationConfig(validation_guidance=GUIDANCE),
        size=SIZE,
        references=pixels,
    )
    given, expected = first_call(pipeline, **{**inputs, "sigmas": [SIGMA, 0.25]})
    references = [family.encode_images(each[None]) for each in pixels]
    check_same_call(family, case, pipeline.transformer, given, expected, references)
    if case.name == "flux":
        attended = given["joint_attention_kwargs"]["attention_mask"]
        assert attended.shape[-1] == 512 + given["hidden_states"].shape[1]


@EVERY_CASE
def test_edit_pipeline_keeps_the_size_of_a_large_reference_and_of_the_image(make: Make, case: Case) -> None:
    family = make(case.name)
    family.load_text_encoders()
    pipeline: Any = family.make_pipeline(family.load_denoiser(), "edit")
    (text,) = family.encode_prompts(["a cat"])
    sizes: list[torch.Size] = []
    validation = ValidationConfig(validation_num_inference_steps=1)
    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda pixels, **options: sizes.append(pixels.shape) or encode(pixels, **options)
    for references in ([torch.zeros(3, 16, 65552)], []):  # a little over a megapixel, and no reference
        inputs = family.pipeline_inputs(
            text, text, validation=validation, size=Size(32, 48), references=references
        )
        image = pipeline(**inputs, height=32, width=48, num_inference_steps=1).images[0]
        assert image.size == (48, 32)
    assert sizes == [(1, 3, 16, 65552)]


@EVERY_CASE
def test_references_change_the_prediction_by_image_place_and_order(make: Make, case: Case) -> None:
    family = make(case.name)
    denoiser, noisy = family.load_denoiser(), noisy_of(case, latents_of(case, SIZE, 0))
    one, other = (latents_of(case, FIRST, seed) for seed in (1, 2))
    with torch.no_grad():
        found = [
            family.predict(denoiser, noisy, batch_of(family, noisy.latents, references))
            for references in ((), (one,), (other,), (one, other), (other, one))
        ]
    for index, each in enumerate(found):
        assert each.shape == noisy.latents.shape
        for later in found[index + 1 :]:
            assert (each - later).abs().max() > 1e-4


@EVERY_CASE
def test_a_sample_with_references_is_predicted_alike_in_any_batch(make: Make, case: Case) -> None:
    family = make(case.name)
    denoiser, prompts = family.load_denoiser(), ["a cat", "a red dog"]
    latents = latents_of(case, SIZE, 0, num=2)
    references = [latents_of(case, FIRST, 1, num=2), latents_of(case, SECOND, 2, num=2)]
    noisy = family.add_noise(latents, sample_indices=[5, 6], seed=3)
    unreferenced = family.add_noise(latents, sample_indices=[5, 6], seed=3)
    assert noisy.sigmas == unreferenced.sigmas
    with torch.no_grad():
        together = family.predict(denoiser, noisy, batch_of(family, latents, references, prompts))
        for index, prompt in enumerate(prompts):
            rows = slice(index, index + 1)
            alone = family.add_noise(latents[rows], sample_indices=[5 + index], seed=3)
            batch = batch_of(family, latents[rows], [each[rows] for each in references], [prompt])
            prediction = family.predict(denoiser, alone, batch)
            torch.testing.assert_close(prediction[0], together[index], rtol=1e-4, atol=1e-5)


@EVERY_CASE
def test_the_rank_mask_of_a_batch_with_references_follows_each_noisy_image(make: Make, case: Case) -> None:
    family = make(case.name)
    denoiser = family.load_denoiser()
    adapter = attach_tlora(denoiser, family.spec, off_start=0.1)
    schedule, prompts = RankSchedule(8, min_rank=2), ["a cat", "a red dog"]
    latents, reference = latents_of(case, SIZE, 0, num=2), latents_of(case, SECOND, 1, num=2)
    noisy = replace(noisy_of(case, latents), timesteps=(950, 20), sigmas=(0.95, 0.02))
    with torch.no_grad():
        with mask.rank_mask(schedule, noisy.timesteps, group=adapter.group):
            together = family.predict(denoiser, noisy, batch_of(family, latents, [reference], prompts))
        for index, prompt in enumerate(prompts):
            rows = slice(index, index + 1)
            alone = replace(
                noisy_of(case, latents[rows]),
                timesteps=(noisy.timesteps[index],),
                sigmas=(noisy.sigmas[index],) if noisy.sigmas else None,
            )
            batch = batch_of(family, latents[rows], [reference[rows]], [prompt])
            with mask.rank_mask(schedule, alone.timesteps, group=adapter.group):
                expected = family.predict(denoiser, alone, batch)
            torch.testing.assert_close(together[index], expected[0], rtol=1e-4, atol=1e-5)
            with mask.rank_mask(schedule, [noisy.timesteps[1 - index]], group=adapter.group):
                other = family.predict(denoiser, alone, batch)
            assert (other - expected).abs().max() > 1e-4


@EVERY_CASE
def test_token_routing_takes_references_as_image_tokens(make: Make, case: Case) -> None:
    family = make(case.name)
    noisy, reference = noisy_of(case, latents_of(case, SIZE, 0)), latents_of(case, SECOND, 1)
    batch = batch_of(family, noisy.latents, [reference])
    num_tokens = NUM_NOISY + SECOND.height * SECOND.width // 16**2
    with torch.no_grad():
        expected = family.predict(family.load_denoiser(), noisy, batch)
        for share in (0.001, 0.5):  # of the tokens that pass the block by: none, and half of them
            routes = {"routes": [{"selection_ratio": share, "start_layer_idx": 1, "end_layer_idx": 2}]}
            denoiser: Any = family.load_denoiser()
            routing = TokenRouting(denoiser, TreadConfig.model_validate(routes), seed=1)
            lengths: list[int] = []
            denoiser.transformer_blocks[1].attn.to_q.register_forward_hook(
                lambda _, inputs, __, seen=lengths: seen.append(inputs[0].shape[1])
            )
            with routing.routed(0):
                found = family.predict(denoiser, noisy, batch)
            assert lengths == [round(num_tokens * (1 - share))]
            assert found.shape == noisy.latents.shape
            assert torch.equal(found, expected) is (share < 0.01)


@EVERY_CASE
def test_gradient_checkpointing_gives_the_same_gradients_with_references(make: Make, case: Case) -> None:
    family = make(case.name)
    denoiser: Any = family.load_denoiser()
    noisy = noisy_of(case, latents_of(case, SIZE, 0))
    gradients = []
    for recomputes in (False, True):
        reference = latents_of(case, SECOND, 1).requires_grad_()
        denoiser.train()
        if recomputes:
            denoiser.enable_gradient_checkpointing()
        family.predict(
            denoiser, noisy, batch_of(family, noisy.latents, [reference])
        ).square().sum().backward()
        assert reference.grad is not None
        gradients.append(reference.grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@EVERY_CASE
def test_edit_pipeline_opens_the_ranks_of_each_step_and_leaves_no_mask(make: Make, case: Case) -> None:
    family = make(case.name)
    family.load_text_encoders()
    pipeline: Any = family.make_pipeline(family.load_denoiser(), "edit")
    adapter = attach_tlora(pipeline.transformer, family.spec, off_start=0.1)
    pipeline._tlora_config = adapter.tlora_config
    opened: list[int] = []

    def look(*_: object) -> None:
        found = mask.current_mask(adapter.group, 8)
        assert found is not None
        opened.append(int(found.sum()))

    pipeline.transformer.x_embedder.register_forward_hook(look)
    (text,) = family.encode_prompts(["a cat"])
    inputs = family.pipeline_inputs(
        text,
        text,
        validation=ValidationConfig(validation_guidance=1.0),
        size=SIZE,
        references=[pixels_of(FIRST)],
    )
    levels = [1.0, 0.3, 0.05, 0.005]
    pipeline(**{**inputs, "sigmas": levels}, height=64, width=80, num_inference_steps=4)
    schedule = RankSchedule(8, min_rank=2)
    assert opened == [schedule.rank_at(int(1000 * level)) for level in levels]
    assert len(set(opened)) > 2
    assert not mask.groups_with_mask()

"""What every family promises, on its tiny models; a family joins by an entry in family_cases.CASES."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig, ValidationConfig
from simpletuner.helpers.contracts import Batch, NoisyBatch, TextEmbeds
from simpletuner.helpers.errors import DataError, ModelError
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.registry import specs
from tests.unit.models.family_cases import CASES, SAMPLE, SIZE, Call, FamilyCase

Make = Callable[..., ModelFamily]
Folder = Callable[[str], Path]
Stock = Callable[..., Any]
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EVERY_FLOW_CASE = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.is_flow], ids=lambda case: case.name
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module")
def stock(tiny: Folder) -> Stock:
    """Loads the stock pipeline of a tiny model."""

    def load(case: FamilyCase, dtype: torch.dtype = torch.float32) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny(case.name), dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="module")
def ready(make: Make) -> Callable[[FamilyCase], ModelFamily]:
    """Gives a family with VAE and text encoders loaded, which no test may change."""
    made: dict[str, ModelFamily] = {}

    def get(case: FamilyCase) -> ModelFamily:
        if case.name not in made:
            made[case.name] = make(case.name)
            made[case.name].load_vae()
            made[case.name].load_text_encoders()
        return made[case.name]

    return get


def pixels() -> Tensor:
    return torch.rand(2, 3, SIZE.height, SIZE.width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents_of(case: FamilyCase, num: int = 1) -> Tensor:
    return torch.randn(num, *case.latent_shape, generator=torch.Generator().manual_seed(0))


def batch_of(family: ModelFamily, latents: Tensor, prompts: list[str]) -> Batch:
    family.load_text_encoders()
    text = TextEmbeds.stack(family.encode_prompts(prompts))
    return Batch(latents, text, samples=(SAMPLE,) * len(prompts), sample_indices=tuple(range(len(prompts))))


def edit(folder: Path, component: str, **changes: object) -> None:
    file = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, component: str, change: Callable[[Tensor], object]) -> None:
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    for weight in weights.values():
        if weight.is_floating_point():
            change(weight)
    save_file(weights, file, metadata={"format": "pt"})


# The model's folder


@EVERY_CASE
def test_tiny_model_is_the_same_byte_for_byte_and_another_for_another_seed(
    tiny: Folder, tmp_path: Path, case: FamilyCase
) -> None:
    torch.manual_seed(99)
    case.save(tmp_path / "again")
    case.save(tmp_path / "other", seed=1)
    files = sorted(file.relative_to(tiny(case.name)) for file in tiny(case.name).rglob("*") if file.is_file())
    assert len(files) > 8
    for file in files:
        content = (tiny(case.name) / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == content
        assert ((tmp_path / "other" / file).read_bytes() == content) is (file.suffix != ".safetensors"), file


@EVERY_CASE
def test_stock_diffusers_makes_a_picture_with_the_tiny_model(stock: Stock, case: FamilyCase) -> None:
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    image = stock(case)(prompt="a cat", **options).images[0]
    assert image.shape == (64, 64, 3)
    assert image.std() > 0.01


def refusal(make: Make, case: FamilyCase, folder: Path) -> str:
    """The message about a broken model, without its folder; "accepted" if there is none."""
    try:
        make(case.name, folder)
    except ModelError as error:
        return str(error).replace(str(folder), "")
    return "accepted"


@EVERY_CASE
def test_a_missing_component_is_named(make: Make, copied: Folder, case: FamilyCase) -> None:
    found = {}
    for component in case.components:
        folder = copied(case.name)
        shutil.rmtree(folder / component)
        found[component] = refusal(make, case, folder)
    wrong = [
        (component, message)
        for component, message in found.items()
        if not re.search(rf"component {component} is missing.* {component}\.", message)
    ]
    assert not wrong


@EVERY_CASE
def test_a_model_of_another_family_is_refused_with_its_pipeline(
    make: Make, tiny: Folder, case: FamilyCase
) -> None:
    for other in CASES.values():
        if other.family != case.family:
            index = json.loads((tiny(other.name) / "model_index.json").read_text())
            with pytest.raises(ModelError, match=rf"{index['_class_name']}.*model_family"):
                make(case.name, tiny(other.name))


@EVERY_CASE
def test_a_component_of_another_class_is_refused(make: Make, copied: Folder, case: FamilyCase) -> None:
    wrong = []
    for component, key, value in case.wrong_classes:
        folder = copied(case.name)
        edit(folder, component, **{key: value})
        named = value[0] if isinstance(value, list) else value or "unknown class"
        message = refusal(make, case, folder)
        if not re.search(rf"component {component} .*{named}", message):
            wrong.append((component, message))
    assert not wrong


@EVERY_CASE
def test_components_that_do_not_fit_are_refused_with_their_numbers(
    make: Make, copied: Folder, case: FamilyCase
) -> None:
    wrong = []
    for component, changes, parts in case.misfits:
        folder = copied(case.name)
        edit(folder, component, **changes)
        message = refusal(make, case, folder)
        if not all(re.search(rf"\b{re.escape(part)}\b", message) for part in parts):
            wrong.append((component, changes, message))
    assert not wrong


def swapped(case: FamilyCase, component: str, folder: Path, subfolder: str | None = None) -> dict[str, Any]:
    return {
        f"pretrained_{component}_model_name_or_path": str(folder),
        f"pretrained_{component}_subfolder": subfolder,
    }


@EVERY_CASE
@pytest.mark.parametrize("layout", ["whole model", "component", "named subfolder"])
def test_denoiser_and_vae_can_come_from_elsewhere(
    make: Make, copied: Folder, case: FamilyCase, layout: str
) -> None:
    for component in (specs()[case.family].denoiser_name, "vae"):
        other, subfolder = copied(case.name), None
        if layout == "component":
            other /= component
        if layout == "named subfolder":
            subfolder = "swapped"
            (other / component).rename(other / subfolder)
        components = make(case.name, **swapped(case, component, other, subfolder)).components
        found = components.vae if component == "vae" else components.denoiser
        assert found.folder == (other if layout == "component" else other / (subfolder or component))


@EVERY_CASE
def test_a_swapped_denoiser_has_the_weights_of_the_other_model(
    make: Make, tmp_path: Path, case: FamilyCase
) -> None:
    case.save(tmp_path / "other", seed=9)
    name, own, other = (
        specs()[case.family].denoiser_name,
        make(case.name),
        make(case.name, tmp_path / "other"),
    )
    mixed = make(case.name, **swapped(case, name, tmp_path / "other"))
    assert (mixed.vae_identity, mixed.text_identity) == (own.vae_identity, own.text_identity)
    weights = [next(iter(family.load_denoiser().parameters())) for family in (own, mixed, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


@EVERY_CASE
def test_the_key_of_a_swapped_component_of_another_class_is_named(
    make: Make, copied: Folder, case: FamilyCase
) -> None:
    other = copied(case.name)
    edit(other, "vae", _class_name="AutoencoderTiny")
    with pytest.raises(ModelError, match=r"^pretrained_vae_model_name_or_path .*AutoencoderTiny"):
        make(case.name, **swapped(case, "vae", other / "vae"))


# Identities


@EVERY_CASE
def test_identities_change_with_the_files_and_not_with_the_place(
    make: Make, copied: Folder, case: FamilyCase
) -> None:
    original, moved = make(case.name), make(case.name, copied(case.name))
    assert (moved.vae_identity, moved.text_identity) == (original.vae_identity, original.text_identity)
    for component in (*case.text_components, "vae"):
        folder = copied(case.name)
        if component.startswith("tokenizer"):
            template = folder / component / "chat_template.jinja"
            file = template if template.is_file() else folder / component / "tokenizer.json"
            file.write_text(file.read_text() + " ")
        else:
            change_weights(folder, component, lambda weight: weight.add_(1e-3))
        changed = make(case.name, folder)
        assert (changed.vae_identity == original.vae_identity) is (component != "vae"), component
        assert (changed.text_identity == original.text_identity) is (component == "vae"), component


@EVERY_CASE
def test_identities_change_with_the_settings_that_change_an_encoding(make: Make, case: FamilyCase) -> None:
    original, half = make(case.name), make(case.name, weight_dtype=torch.bfloat16)
    tiled = make(case.name, precision=PrecisionConfig(vae_enable_tiling=True))
    quantised = make(case.name, precision=PrecisionConfig(text_encoder_1_precision="int8-torchao"))
    assert half.text_identity != original.text_identity
    assert half.vae_identity == original.vae_identity
    assert tiled.vae_identity != original.vae_identity
    assert tiled.text_identity == original.text_identity
    assert quantised.text_identity == f"{original.text_identity} 1=int8-torchao"


# Loading


@EVERY_CASE
def test_load_and_unload_may_be_repeated(make: Make, case: FamilyCase) -> None:
    family = make(case.name)
    with pytest.raises(AssertionError, match="load_text_encoders"):
        family.encode_prompts(["a cat"])
    for _ in range(2):
        family.load_vae()
        family.load_text_encoders()
    for _ in range(2):
        family.unload_vae()
        family.unload_text_encoders()
    with pytest.raises(AssertionError, match="load_vae"):
        family.encode_images(pixels())


@EVERY_CASE
def test_load_denoiser_is_frozen_and_in_the_weight_dtype(make: Make, case: FamilyCase) -> None:
    denoiser = make(case.name, weight_dtype=torch.bfloat16).load_denoiser()
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


# Images


@EVERY_CASE
def test_encode_images_equals_the_stock_pipeline(
    ready: Callable[[FamilyCase], ModelFamily], stock: Stock, case: FamilyCase
) -> None:
    latents = ready(case).encode_images(pixels())
    assert latents.shape == (2, *case.latent_shape)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        expected = case.stock_latents(stock(case), pixels())
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)


@EVERY_CASE
def test_encode_images_stays_in_float32_when_the_denoiser_does_not(
    ready: Callable[[FamilyCase], ModelFamily], make: Make, case: FamilyCase
) -> None:
    half = make(case.name, weight_dtype=torch.bfloat16)
    half.load_vae()
    assert torch.equal(half.encode_images(pixels()), ready(case).encode_images(pixels()))


@EVERY_CASE
def test_encode_images_refuses_what_is_not_finite_and_says_which_image(
    ready: Callable[[FamilyCase], ModelFamily], case: FamilyCase
) -> None:
    broken = pixels()
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="image 2 of 2"):
        ready(case).encode_images(broken)


# Prompts


@EVERY_CASE
def test_encode_prompts_equals_the_stock_pipeline(
    ready: Callable[[FamilyCase], ModelFamily], stock: Stock, case: FamilyCase
) -> None:
    family, pipeline = ready(case), stock(case)
    prompts = ["a photo of a cat", ""]
    together = family.encode_prompts(prompts)
    for prompt, of_two in zip(prompts, together, strict=True):
        with torch.no_grad():
            expected = case.stock_text(pipeline, prompt)
        (found,) = family.encode_prompts([prompt])
        assert found.tensors().keys() - {"mask"} == expected.keys()
        assert found.prompt_embeds.shape[:2] == (1, case.max_tokens)
        for name, tensor in expected.items():
            assert torch.equal(found.tensors()[name], tensor), name
            torch.testing.assert_close(of_two.tensors()[name], tensor)


@EVERY_CASE
def test_encode_prompts_gives_whole_tensors_on_the_host_from_16_bit_encoders(
    make: Make, case: FamilyCase
) -> None:
    family = make(case.name, weight_dtype=torch.bfloat16)
    family.load_text_encoders()
    (embeds,) = family.encode_prompts(["a cat"])
    assert embeds.prompt_embeds.dtype == (case.text_dtype or torch.bfloat16)
    assert torch.equal(embeds.prompt_embeds, embeds.prompt_embeds.bfloat16().to(embeds.prompt_embeds.dtype))
    for tensor in embeds.tensors().values():
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


@EVERY_CASE
def test_encode_prompts_warns_once_of_captions_that_are_cut(
    make: Make,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    case: FamilyCase,
) -> None:
    family = make(case.name)
    family.load_text_encoders()
    fitting, long = ("cat" + " cat" * (case.max_tokens - case.extra_tokens - 1 + more) for more in (0, 1))
    with caplog.at_level(logging.WARNING):
        family.encode_prompts([fitting])
        assert not caplog.records
        family.encode_prompts(["a cat", long])
        family.encode_prompts([long + " cat"])
    (record,) = caplog.records
    assert f" {case.max_tokens + 1} tokens" in record.getMessage()
    assert f" {case.max_tokens};" in record.getMessage()
    assert repr(long[:80]) in record.getMessage()
    assert "".join(capfd.readouterr()) == "", "the libraries' own warnings"


@EVERY_CASE
def test_encode_prompts_refuses_what_is_not_finite(make: Make, copied: Folder, case: FamilyCase) -> None:
    folder = copied(case.name)
    change_weights(folder, "text_encoder", lambda weight: weight[0].fill_(float("inf")))
    family = make(case.name, folder)
    family.load_text_encoders()
    with pytest.raises(DataError, match=r"'a cat'.*torch\.float32"):
        family.encode_prompts(["a cat"])


# Noise


@EVERY_CASE
def test_a_sample_is_noised_and_predicted_alike_in_any_batch(make: Make, case: FamilyCase) -> None:
    family = make(case.name, noise=NoiseConfig(flux_guidance_mode="random-range"))
    prompts = ["a cat", "", "a red dog"]
    denoiser, latents = family.load_denoiser(), latents_of(case, 3)
    noisy = family.add_noise(latents, sample_indices=[5, 6, 7], seed=3)
    with torch.no_grad():
        together = family.predict(denoiser, noisy, batch_of(family, latents, prompts))
        for index, prompt in enumerate(prompts):
            own = latents[index : index + 1]
            alone = family.add_noise(own, sample_indices=[5 + index], seed=3)
            assert torch.equal(alone.latents[0], noisy.latents[index])
            assert alone.timesteps == (noisy.timesteps[index],)
            prediction = family.predict(denoiser, alone, batch_of(family, own, [prompt]))
            torch.testing.assert_close(prediction[0], together[index], rtol=1e-4, atol=1e-5)
    assert together.shape == noisy.target.shape == latents.shape
    assert together.dtype == torch.float32


@EVERY_FLOW_CASE
def test_flow_matching_moves_from_the_image_to_the_noise(
    ready: Callable[[FamilyCase], ModelFamily], case: FamilyCase
) -> None:
    latents = latents_of(case, 3)
    noisy = ready(case).add_noise(latents, sample_indices=[4, 5, 6], seed=2)
    assert noisy.sigmas is not None
    assert noisy.timesteps == tuple(int(torch.tensor(sigma) * 1000) for sigma in noisy.sigmas)
    sigma = torch.tensor(noisy.sigmas)[:, None, None, None]
    torch.testing.assert_close(noisy.latents - sigma * noisy.target, latents)


@EVERY_FLOW_CASE
def test_training_has_the_guidance_of_the_configuration_if_the_model_takes_one(
    make: Make, case: FamilyCase
) -> None:
    family = make(case.name, noise=NoiseConfig(flux_guidance_value=3.0))
    noisy = family.add_noise(latents_of(case, 2), sample_indices=[0, 1], seed=0)
    assert noisy.guidance == ((3.0, 3.0) if case.has_guidance else None)


def shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


@pytest.mark.parametrize(
    ("case", "row"),
    [
        pytest.param(case, row, id=f"{name}-{index}")
        for name, case in CASES.items()
        for index, row in enumerate(case.shifts)
    ],
)
def test_training_and_validation_have_the_same_shift(
    ready: Callable[[FamilyCase], ModelFamily], make: Make, case: FamilyCase, row: Any
) -> None:
    keys, size, shift = row
    family = make(case.name, noise=NoiseConfig.model_validate(keys))
    plain = make(case.name, noise=NoiseConfig(flow_schedule_shift=1.0))
    height, width = size.height // case.pixels_per_latent, size.width // case.pixels_per_latent
    latents = torch.zeros(1, 1, height, width)
    (sigma,) = family.add_noise(latents, sample_indices=[5], seed=1).sigmas or ()
    (unshifted,) = plain.add_noise(latents, sample_indices=[5], seed=1).sigmas or ()
    assert sigma == pytest.approx(shifted(unshifted, shift), rel=1e-5)
    (text,) = ready(case).encode_prompts(["a cat"])
    for steps in (2, 4, 50):
        validation = ValidationConfig(validation_num_inference_steps=steps)
        inputs = family.pipeline_inputs(text, text, validation=validation, size=size)
        assert inputs["sigmas"][0] == 1.0
        assert inputs["sigmas"][steps // 2] == pytest.approx(shifted(0.5, shift), rel=1e-5)
        assert len(inputs["sigmas"]) == steps


# The denoiser's call


def first_call(pipeline: Any, denoiser: Any, **arguments: Any) -> tuple[Call, Tensor]:
    """What a pipeline calls its denoiser with in the first step, and the output."""
    calls: list[tuple[Call, Tensor]] = []

    def look(_: object, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        calls.append(((args, options), output[0]))

    handle = denoiser.register_forward_hook(look, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    pipeline(**arguments, num_inference_steps=2, output_type="latent", generator=generator)
    handle.remove()
    return calls[0]


def tensors_in(call: Call) -> Iterator[tuple[str, Tensor]]:
    named = {**{f"argument {index}": value for index, value in enumerate(call[0])}, **call[1]}
    named |= named.pop("added_cond_kwargs", None) or {}
    yield from ((name, value) for name, value in named.items() if isinstance(value, Tensor))


@EVERY_CASE
@DTYPES
def test_predict_calls_the_denoiser_as_the_stock_pipeline_does(
    make: Make, stock: Stock, case: FamilyCase, dtype: torch.dtype
) -> None:
    pipeline, family = stock(case, dtype), make(case.name, weight_dtype=dtype)
    if case.is_flow:
        pipeline.scheduler.register_to_config(use_dynamic_shifting=False)
        pipeline.scheduler.set_shift(1.0)
    denoiser = pipeline.components[family.spec.denoiser_name]
    options = {"height": SIZE.height, "width": SIZE.width, **case.stock_options}
    given, expected = first_call(pipeline, denoiser, prompt="a cat", **options)
    noisy, calls = case.noisy(given), []
    denoiser.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        found = family.predict(denoiser, noisy, batch_of(family, noisy.latents, ["a cat"]))
    ours, theirs = dict(tensors_in(calls[0])), dict(tensors_in(given))
    assert ours.keys() == theirs.keys()
    # A scalar timestep, and positions in another dtype, are the same to the denoiser.
    assert not [name for name in ours if not (ours[name].float() == theirs[name].float()).all()]
    assert not [name for name in ours if ours[name].numel() != theirs[name].numel()]
    assert found.dtype == torch.float32
    assert torch.equal(found, case.unpacked(expected.float()))


@EVERY_CASE
def test_gradients_reach_the_latents(ready: Callable[[FamilyCase], ModelFamily], case: FamilyCase) -> None:
    family, latents = ready(case), latents_of(case).requires_grad_()
    noisy = NoisyBatch(
        latents,
        latents,
        (500,),
        torch.ones(1),
        (0.5,) if case.is_flow else None,
        (1.0,) if case.has_guidance else None,
    )
    prediction = family.predict(family.load_denoiser(), noisy, batch_of(family, latents.detach(), ["a cat"]))
    prediction.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0


# The pipeline


@EVERY_CASE
def test_pipeline_inputs_are_the_arguments_that_the_model_can_use(
    ready: Callable[[FamilyCase], ModelFamily], case: FamilyCase
) -> None:
    family = ready(case)
    prompt, negative = family.encode_prompts(["a cat", "a dog"])
    validation = ValidationConfig(validation_guidance=5.0)
    inputs = family.pipeline_inputs(prompt, negative, validation=validation, size=SIZE)
    assert inputs.keys() == case.pipeline_inputs
    assert inputs["guidance_scale"] == 5.0
    assert torch.equal(inputs["prompt_embeds"], prompt.prompt_embeds)
    if "negative_prompt_embeds" in inputs:
        assert torch.equal(inputs["negative_prompt_embeds"], negative.prompt_embeds)


@EVERY_CASE
def test_bundled_pipeline_makes_a_picture_from_the_familys_inputs(
    ready: Callable[[FamilyCase], ModelFamily], case: FamilyCase
) -> None:
    family = ready(case)
    denoiser, (prompt, negative) = family.load_denoiser(), family.encode_prompts(["a cat", ""])
    validation = ValidationConfig(validation_num_inference_steps=2)
    inputs = family.pipeline_inputs(prompt, negative, validation=validation, size=SIZE)
    pipeline = family.make_pipeline(denoiser)
    assert pipeline.components[family.spec.denoiser_name] is denoiser
    options = {"height": SIZE.height, "width": SIZE.width, "num_inference_steps": 2, "output_type": "np"}
    image = pipeline(**inputs, **options).images[0]
    assert image.shape == (SIZE.height, SIZE.width, 3)
    assert math.isfinite(image.sum())
    assert image.std() > 0.01

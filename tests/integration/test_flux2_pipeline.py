"""The bundled Flux.2 pipelines: diffusers' own without an adapter, and masked around each call with one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import accelerate.hooks
import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import nn

from simpletuner.helpers.adapters.attachment import CHILD_PREFIX
from simpletuner.helpers.adapters.inference import remove_from_pipeline
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig, ValidationConfig
from simpletuner.helpers.contracts import PipelineType, Size
from simpletuner.helpers.models.family import FamilyContext
from simpletuner.helpers.models.flux2 import pipeline as bundled
from simpletuner.helpers.models.flux2.family import Flux2
from simpletuner.helpers.models.flux2.spec import SPEC
from tests.integration.attached import attach_tlora
from tests.integration.family_runs import tiny_flux2

NAMES = ["Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"]
SCHEDULE = RankSchedule(8, min_rank=2)


def load(name: str, module: Any = bundled) -> Any:
    folder = tiny_flux2("dev" if name == "Flux2Pipeline" else "klein")
    pipeline = vars(module)[name] if module is bundled else module.__getattr__(name)
    loaded = pipeline.from_pretrained(folder, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def picture(mode: str, seed: int = 0) -> Image.Image:
    shape = (64, 80, 3) if mode == "RGB" else (64, 80)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def sample(pipeline: Any, **arguments: Any) -> np.ndarray:
    name = type(pipeline).__name__
    options: dict[str, Any] = {"height": 64, "width": 80, "num_inference_steps": 3, "output_type": "np"}
    if "Inpaint" in name:
        options |= {"image": picture("RGB"), "mask_image": picture("L"), "strength": 0.7}
    if "prompt_embeds" not in arguments:  # dev puts 129 tokens around a prompt, Klein 34
        options |= {"prompt": "a photo of a cat", "max_sequence_length": 144 if "Klein" not in name else 48}
    images: np.ndarray = pipeline(generator=torch.Generator().manual_seed(0), **options | arguments).images
    return images


def attach(pipeline: Any) -> LycorisAdapter:
    """An adapter of rank 8 on all attention and feed-forward layers, as if trained; its schedule is set."""
    adapter = attach_tlora(pipeline.transformer, SPEC, off_start=0.1)
    pipeline._tlora_config = adapter.tlora_config
    return adapter


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Flux2Pipeline", {}),
        ("Flux2Pipeline", {"prompt": ["a cat", "a dog"], "image": [picture("RGB")], "guidance_scale": 2.0}),
        ("Flux2KleinPipeline", {}),
        ("Flux2KleinPipeline", {"guidance_scale": 1.0, "num_images_per_prompt": 2}),
        ("Flux2KleinPipeline", {"image": [picture("RGB"), picture("RGB", 1)]}),
        ("Flux2KleinInpaintPipeline", {}),
        ("Flux2KleinInpaintPipeline", {"image_reference": picture("RGB", 1), "guidance_scale": 1.0}),
        ("Flux2KleinKVPipeline", {}),
        ("Flux2KleinKVPipeline", {"image": picture("RGB")}),
    ],
)
def test_bundled_pipeline_without_an_adapter_equals_the_stock_one(name: str, call: dict[str, Any]) -> None:
    expected = sample(load(name, diffusers), **call)
    assert expected.std() > 0.01
    assert np.array_equal(sample(load(name), **call), expected)


@pytest.mark.parametrize("name", NAMES)
def test_bundled_pipeline_is_called_with_the_arguments_of_its_diffusers_class(name: str) -> None:
    own, stock = vars(bundled)[name], diffusers.__getattr__(name)  # type: ignore[attr-defined]
    assert inspect.signature(own.__call__) == inspect.signature(stock.__call__)
    assert len(inspect.signature(own.__call__).parameters) > 15


@pytest.mark.parametrize(
    ("name", "call", "calls_per_step"),
    [
        ("Flux2Pipeline", {"image": [picture("RGB")]}, 1),
        ("Flux2KleinPipeline", {"guidance_scale": 4.0}, 2),
        ("Flux2KleinPipeline", {"guidance_scale": 1.0}, 1),
        ("Flux2KleinInpaintPipeline", {"guidance_scale": 4.0}, 2),
        ("Flux2KleinKVPipeline", {"image": picture("RGB")}, 1),
    ],
)
def test_every_call_of_the_transformer_has_the_ranks_of_its_step_and_leaves_none(
    name: str, call: dict[str, Any], calls_per_step: int
) -> None:
    pipeline = load(name)
    adapter = attach(pipeline)
    between: list[object] = []
    within: list[int] = []
    stepped: list[float] = []

    def look(*_: object) -> None:
        opened = mask.current_mask(adapter.group, SCHEDULE.max_rank)
        assert opened is not None
        within.append(int(opened.sum()))

    def note(_: object, __: int, timestep: torch.Tensor, ___: object) -> dict[str, Any]:
        stepped.append(float(timestep))
        return {}

    # Registered before the pipeline's own hooks, so it runs before them: between two calls.
    pipeline.transformer.register_forward_pre_hook(lambda *_: between.append(len(mask.groups_with_mask())))
    pipeline.transformer.x_embedder.register_forward_hook(look)
    levels = [1.0, 0.3, 0.05, 0.005]
    sample(pipeline, callback_on_step_end=note, num_inference_steps=4, sigmas=levels, **call)
    assert within == [
        rank for timestep in stepped for rank in [SCHEDULE.rank_at(int(timestep))] * calls_per_step
    ]
    assert len(set(within)) > 2
    assert between == [0] * len(within)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_cleared_when_the_transformer_fails(name: str) -> None:
    pipeline = load(name)
    adapter = attach(pipeline)

    def fail(*_: object) -> None:
        assert mask.current_mask(adapter.group, SCHEDULE.max_rank) is not None
        raise RuntimeError("out of memory")

    handle = pipeline.transformer.x_embedder.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(pipeline)
    assert not mask.groups_with_mask()
    handle.remove()
    again = sample(pipeline)
    fresh = load(name)
    attach(fresh)
    assert np.array_equal(again, sample(fresh))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_changes_the_picture_and_leaves_nothing_when_removed(name: str) -> None:
    pipeline = load(name)
    base = sample(pipeline)
    adapter = attach(pipeline)
    adapted = sample(pipeline)
    pipeline._tlora_config = None
    with mask.rank_mask(SCHEDULE, [0], group=adapter.group):  # all ranks open, at every step
        unmasked = sample(pipeline)
    assert np.abs(adapted - base).max() > 1e-3
    assert np.abs(adapted - unmasked).max() > 1e-4
    remove_from_pipeline(pipeline, adapter)
    assert np.array_equal(sample(pipeline), base)


@pytest.mark.parametrize("name", NAMES[:3])
def test_model_offload_moves_the_adapter_and_changes_no_picture(name: str) -> None:
    pipeline = load(name)
    attach(pipeline)
    expected = sample(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu:0")
    for _ in range(2):  # offload is set up again after each call
        np.testing.assert_allclose(sample(pipeline), expected, rtol=0, atol=1e-5)


@pytest.fixture
def offload_to_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accelerate's layer-wise offload run on a machine without an accelerator.

    diffusers adds an index to the device's name, and a parameter moved from "cpu" to "cpu:0" is no parameter.
    """
    place = accelerate.hooks.set_module_tensor_to_device

    def quantize_and_move(module: nn.Module, name: str, device: Any, *args: Any, **options: Any) -> None:
        place(module, name, "cpu" if str(device) == "cpu:0" else device, *args, **options)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", quantize_and_move)


@pytest.mark.usefixtures("offload_to_cpu")
@pytest.mark.parametrize("name", NAMES[:2])
def test_sequential_offload_carries_the_adapter_and_changes_no_picture(name: str) -> None:
    whole = load(name)
    with torch.no_grad():
        embeds, _ = whole.encode_prompt("a photo of a cat", device="cpu")
    parts = {"vae": whole.vae, "transformer": whole.transformer, "scheduler": whole.scheduler}
    pipeline = type(whole)(**parts, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    texts = {"prompt_embeds": embeds}
    if name == "Flux2KleinPipeline":
        texts["negative_prompt_embeds"] = embeds * 0.5
    adapter = attach(pipeline)
    expected = sample(pipeline, **texts)
    pipeline.enable_sequential_cpu_offload(device="cpu:0")
    for _ in range(2):
        assert np.array_equal(sample(pipeline, **texts), expected)
    parameters = dict(pipeline.transformer.named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    assert any(CHILD_PREFIX in key for key in parameters)
    pipeline.remove_all_hooks()
    remove_from_pipeline(pipeline, adapter)
    assert np.abs(sample(pipeline, **texts) - expected).max() > 1e-4


MakeFlux2 = Callable[..., Flux2]


def make_family(kind: str, dtype: torch.dtype = torch.float32, **noise: Any) -> Flux2:
    config = {"model_family": "flux2", "pretrained_model_name_or_path": str(tiny_flux2(kind))}
    return Flux2(
        FamilyContext(
            model=ModelConfig.model_validate(config),
            noise=NoiseConfig(**noise),
            precision=PrecisionConfig(),
            device=torch.device("cpu"),
            weight_dtype=dtype,
        )
    )


def inputs_of(family: Flux2, *, guidance: float = 4.0) -> Mapping[str, object]:
    family.load_text_encoders()
    prompt, negative = (family.encode_prompts([text])[0] for text in ("a photo of a cat", ""))
    family.unload_text_encoders()
    pictures = ValidationConfig(validation_guidance=guidance, validation_num_inference_steps=3)
    return family.pipeline_inputs(prompt, negative, validation=pictures, size=Size(64, 80))


@pytest.mark.parametrize(
    ("kind", "start", "name"),
    [
        ("dev", "text2image", "Flux2Pipeline"),
        ("klein", "text2image", "Flux2KleinPipeline"),
        ("klein", "image2image", "Flux2KleinPipeline"),
        ("klein", "inpaint", "Flux2KleinInpaintPipeline"),
    ],
)
def test_the_pipeline_of_the_family_equals_the_stock_one_at_the_same_noise_levels(
    kind: str, start: PipelineType, name: str
) -> None:
    family, stock = make_family(kind, flow_schedule_shift=3.0), load(name, diffusers)
    stock.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = family.make_pipeline(family.load_denoiser(), start)
    assert type(pipeline) is vars(bundled)[name]
    found = sample(pipeline, **inputs_of(family))
    expected = sample(stock, guidance_scale=4.0, max_sequence_length=512)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


class EnoughError(Exception):
    """Ends a sampling whose noise levels are all that a test is about."""


def stop(*_: object) -> None:
    raise EnoughError


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_the_noise_levels_of_pictures_are_the_stock_pipelines_at_50_steps(kind: str) -> None:
    family = make_family(kind)
    family.load_text_encoders()
    (text,) = family.encode_prompts(["a cat"])
    pictures = ValidationConfig(validation_num_inference_steps=50)
    inputs = family.pipeline_inputs(text, text, validation=pictures, size=Size(64, 80))
    pipeline = family.make_pipeline(family.load_denoiser())
    stock = load("Flux2Pipeline" if kind == "dev" else "Flux2KleinPipeline", diffusers)
    levels = []
    for each, arguments in ((pipeline, inputs), (stock, {})):
        each.transformer.register_forward_pre_hook(stop)
        with pytest.raises(EnoughError):
            sample(each, num_inference_steps=50, **arguments)
        levels.append(each.scheduler.sigmas)
    torch.testing.assert_close(levels[0], levels[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", ["text2image", "inpaint"])
def test_a_16_bit_pipeline_leaves_the_vae_as_it_was(dtype: torch.dtype, start: PipelineType) -> None:
    family = make_family("klein", dtype)
    family.load_vae()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    pipeline = family.make_pipeline(family.load_denoiser(), start)
    images = sample(pipeline, **inputs_of(family))
    assert np.isfinite(images).all()
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.float32}
    torch.testing.assert_close(family.encode_images(pixels), latents, rtol=1e-6, atol=1e-6)


def test_a_distilled_klein_is_sampled_without_guidance_and_without_a_word_about_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    family = make_family("distilled")
    pipeline = family.make_pipeline(family.load_denoiser())
    inputs = inputs_of(family)
    capfd.readouterr()
    diffusers_logging.set_verbosity_warning()
    calls: list[object] = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    sample(pipeline, **inputs)
    assert len(calls) == 3
    assert "".join(capfd.readouterr()) == ""


def test_guidance_reaches_dev_as_a_number_and_klein_as_a_second_pass() -> None:
    for kind in ("dev", "klein"):
        family = make_family(kind)
        pipeline = family.make_pipeline(family.load_denoiser())
        told, untold = (sample(pipeline, **inputs_of(family, guidance=each)) for each in (6.0, 1.0))
        assert not np.array_equal(told, untold)

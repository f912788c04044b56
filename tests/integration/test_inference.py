"""An adapter file in any pipeline: one call to load it, strength, removal, several at once, offload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.hooks
import diffusers
import numpy as np
import pytest
import torch
import torch._dynamo
from lycoris.modules.tlora import TLoraModule, get_timestep_mask
from torch import nn

from simpletuner.helpers.adapters.attachment import CHILD_PREFIX
from simpletuner.helpers.adapters.inference import load_into_pipeline, masked, remove_from_pipeline
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.models.sdxl.pipeline import StableDiffusionXLPipeline
from tests.integration.tiny_pipelines import load, sample, trained_adapter_file
from tests.integration.tiny_runs import tiny_model

STOCK = diffusers.StableDiffusionXLPipeline


def reference(strength: float = 1.0, **options: Any) -> np.ndarray:
    """What the bundled pipeline makes with the adapter attached and its schedule set by hand."""
    pipeline = load(tiny_model())
    load_adapter(pipeline.unet, trained_adapter_file(**options), strength=strength)
    config = {"max_rank": options.get("linear_dim", 8), "min_rank": 2, "alpha": 1.0}
    pipeline._tlora_config = config
    return sample(pipeline)


@pytest.mark.parametrize("kind", [STOCK, StableDiffusionXLPipeline], ids=["stock", "bundled"])
def test_one_call_loads_a_file_with_its_schedule_into_a_pipeline(kind: Any) -> None:
    pipeline = load(tiny_model(), kind)
    before, weights = sample(pipeline), {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    adapter = load_into_pipeline(pipeline, str(trained_adapter_file()))
    assert pipeline._tlora_config == RankSchedule(8, min_rank=2).config()
    assert np.array_equal(sample(pipeline), reference())
    adapter.set_strength(0.5)
    assert np.array_equal(sample(pipeline), reference(strength=0.5))
    adapter.set_strength(0.0)
    assert np.array_equal(sample(pipeline), before)
    remove_from_pipeline(pipeline, adapter)
    assert pipeline._tlora_config is None
    assert np.array_equal(sample(pipeline), before)
    assert all(torch.equal(value, weights[key]) for key, value in pipeline.unet.state_dict().items())
    assert not [module for module in pipeline.unet.modules() if isinstance(module, TLoraLayer)]


def test_stock_pipeline_keeps_its_class_name_when_masked_and_saved(tmp_path: Path) -> None:
    pipeline = load(tiny_model(), STOCK)
    load_into_pipeline(pipeline, trained_adapter_file())
    assert isinstance(pipeline, STOCK)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == STOCK.__name__
    again = load(tmp_path, diffusers.DiffusionPipeline)
    assert np.array_equal(sample(again), sample(load(tiny_model(), STOCK)))


def test_pipeline_made_from_another_is_masked_once_it_is_given_to_masked() -> None:
    pipeline = load(tiny_model(), STOCK)
    load_into_pipeline(pipeline, trained_adapter_file())
    second = STOCK(**pipeline.components)
    second.set_progress_bar_config(disable=True)
    unmasked = sample(second)
    masked(second)._tlora_config = pipeline._tlora_config
    assert np.array_equal(sample(second), reference())
    assert np.abs(unmasked - reference()).max() > 1e-3


def test_two_files_of_different_schedules_add_up_and_each_can_be_removed() -> None:
    pipeline = load(tiny_model(), STOCK)
    small = trained_adapter_file(linear_dim=4, linear_alpha=4.0)
    first = load_into_pipeline(pipeline, trained_adapter_file())
    second = load_into_pipeline(pipeline, small)
    both = sample(pipeline)
    remove_from_pipeline(pipeline, second)
    assert np.array_equal(sample(pipeline), reference())
    remove_from_pipeline(pipeline, first)
    load_into_pipeline(pipeline, small)
    only_small = sample(pipeline)
    assert np.array_equal(only_small, reference(linear_dim=4, linear_alpha=4.0))
    assert np.abs(both - only_small).max() > 1e-3


def test_stock_layers_beside_ours_are_masked_through_the_public_group() -> None:
    pipeline = load(tiny_model())
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    stock = TLoraModule("lycoris_stock", layer, 1.0, 8, 8.0)
    with torch.no_grad():
        stock.lambda_layer.mul_(3)
    stock.apply_to()
    adapter = load_into_pipeline(pipeline, trained_adapter_file())
    seen: list[tuple[int, int]] = []

    def look(*_: object) -> None:
        public, own = get_timestep_mask(mask.PUBLIC_GROUP), mask.current_mask(adapter.group, 8)
        assert public is not None
        assert own is not None
        seen.append((int(public.sum()), int(own.sum())))

    pipeline.unet.conv_in.register_forward_hook(look)
    sample(pipeline)
    assert len({public for public, _ in seen}) > 1
    assert all(public == own for public, own in seen)


def test_public_group_stays_closed_without_stock_layers() -> None:
    pipeline = load(tiny_model())
    load_into_pipeline(pipeline, trained_adapter_file())
    seen: list[object] = []
    pipeline.unet.conv_in.register_forward_hook(lambda *_: seen.append(get_timestep_mask(mask.PUBLIC_GROUP)))
    sample(pipeline)
    assert seen
    assert not [each for each in seen if each is not None]


def test_model_offload_moves_the_adapter_and_changes_no_picture() -> None:
    pipeline = load(tiny_model())
    load_into_pipeline(pipeline, trained_adapter_file())
    pipeline.enable_model_cpu_offload(device="cpu:0")
    for _ in range(2):  # offload is set up again after each call
        np.testing.assert_allclose(sample(pipeline), reference(), rtol=0, atol=2e-6)


def test_adapter_is_loaded_after_model_offload_too() -> None:
    pipeline = load(tiny_model())
    pipeline.enable_model_cpu_offload(device="cpu:0")
    load_into_pipeline(pipeline, trained_adapter_file())
    np.testing.assert_allclose(sample(pipeline), reference(), rtol=0, atol=2e-6)


def compile_in_place(pipeline: Any) -> None:
    pipeline.unet.compile(backend="eager", fullgraph=True)


def compile_as_wrapper(pipeline: Any) -> None:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager", fullgraph=True)


def compile_repeated_blocks(pipeline: Any) -> None:
    pipeline.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize("compiled", [compile_in_place, compile_as_wrapper, compile_repeated_blocks])
def test_compiled_denoiser_follows_the_schedule_in_one_graph(compiled: Callable[[Any], None]) -> None:
    torch.compiler.reset()
    pipeline = load(tiny_model())
    compiled(pipeline)
    load_into_pipeline(pipeline, trained_adapter_file())
    np.testing.assert_allclose(sample(pipeline), reference(), rtol=0, atol=2e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample(pipeline, num_inference_steps=50)


@pytest.fixture
def offload_to_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accelerate's layer-wise offload run on a machine without an accelerator.

    diffusers adds an index to the device's name, and a parameter moved from "cpu" to "cpu:0" is no parameter.
    """
    place = accelerate.hooks.set_module_tensor_to_device

    def quantize_and_move(module: nn.Module, name: str, device: Any, *args: Any, **options: Any) -> None:
        place(module, name, "cpu" if str(device) == "cpu:0" else device, *args, **options)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", quantize_and_move)


def encoded(kind: Any = StableDiffusionXLPipeline) -> tuple[Any, dict[str, torch.Tensor]]:
    """A pipeline without text encoders, and an encoded prompt for it."""
    whole = load(tiny_model(), kind)
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    with torch.no_grad():
        embeds = whole.encode_prompt("a photo of sks cat", device="cpu")
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = kind(vae=whole.vae, unet=whole.unet, scheduler=whole.scheduler, add_watermarker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, dict(zip(names, embeds, strict=True))


@pytest.mark.usefixtures("offload_to_cpu")
@pytest.mark.parametrize("kind", [STOCK, StableDiffusionXLPipeline], ids=["stock", "bundled"])
def test_sequential_offload_carries_the_adapter_and_changes_no_picture(kind: Any) -> None:
    pipeline, embeds = encoded(kind)
    base = sample(pipeline, **embeds)
    adapter = load_into_pipeline(pipeline, trained_adapter_file())
    expected = sample(pipeline, **embeds)
    pipeline.enable_sequential_cpu_offload(device="cpu:0")
    for _ in range(2):
        assert np.array_equal(sample(pipeline, **embeds), expected)
    parameters = dict(pipeline.unet.named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    assert any(CHILD_PREFIX in name for name in parameters)
    assert not [key for key in pipeline.unet.state_dict() if CHILD_PREFIX in key]
    pipeline.remove_all_hooks()
    remove_from_pipeline(pipeline, adapter)
    assert np.array_equal(sample(pipeline, **embeds), base)


@pytest.mark.usefixtures("offload_to_cpu")
def test_loading_under_sequential_offload_is_refused_and_says_what_to_do() -> None:
    pipeline, embeds = encoded()
    base = sample(pipeline, **embeds)
    pipeline.enable_sequential_cpu_offload(device="cpu:0")
    with pytest.raises(AdapterError, match="offload"):
        load_into_pipeline(pipeline, trained_adapter_file())
    assert np.array_equal(sample(pipeline, **embeds), base)


def test_pipeline_without_a_denoiser_is_refused() -> None:
    pipeline = load(tiny_model(), STOCK)
    pipeline.unet = None
    with pytest.raises(AdapterError, match="no unet or transformer"):
        load_into_pipeline(pipeline, trained_adapter_file())

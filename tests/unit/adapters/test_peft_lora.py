"""PEFT LoRA: target layers by pattern, rsLoRA and DoRA, each read again by its readers."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.flux.spec import SPEC as FLUX
from simpletuner.helpers.models.flux.tiny import make_transformer
from simpletuner.helpers.models.flux2.spec import SPEC as FLUX2
from simpletuner.helpers.models.flux2.tiny import make_transformer as make_flux2
from simpletuner.helpers.models.sdxl.spec import SPEC as SDXL
from tests.unit.adapters.attaching import attach
from tests.unit.adapters.test_network import pipeline_around, predict, unet

PATTERN = r".*(attn1\.to_[qk]|conv_in)"
FILE = "pytorch_lora_weights.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "rslora and pissa": {"use_rslora": True, "lora_init_type": "pissa"},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "dora of convolutions": {"use_dora": True, "peft_lora_target_modules": ("conv1", "to_q")},
    "pattern": {"peft_lora_target_modules": PATTERN},
}


def shake(adapter: Adapter) -> None:
    """Move the trained parameters off their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def trained(**keys: Any) -> tuple[UNet2DConditionModel, Any]:
    model = unet()
    adapter = attach(model, lora_rank=4, lora_alpha=1.5, **keys)
    shake(adapter)
    return model, adapter


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-3 of the adapter's effect."""
    effect = float((expected - predict(unet(), None, 500, 10)).abs().max().detach())
    assert effect > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * effect)


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("reader", ["diffusers", "ours"])
def test_every_reader_gives_the_delta_of_the_live_adapter(
    reader: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    model, adapter = trained(**keys)
    expected = predict(model, None, 500, 10)
    magnitudes = [key for key in adapter.state_dict() if "lora_magnitude_vector" in key]
    assert len(magnitudes) == (adapter.num_layers if keys.get("use_dora") else 0)
    adapter.save(tmp_path / FILE, metadata={"base_model": "tiny"})
    if reader == "diffusers":
        pipeline = pipeline_around(unet())
        pipeline.load_lora_weights(tmp_path)
        assert_equal(predict(pipeline.unet, None, 500, 10), expected)
    else:
        fresh = unet()
        load_adapter(fresh, tmp_path / FILE)
        assert_equal(predict(fresh, None, 500, 10), expected)


@pytest.mark.parametrize("keys", [KINDS[name] for name in KINDS if name != "rslora and pissa"])
def test_init_lora_and_a_checkpoint_give_it_again(keys: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = trained(**keys)
    expected = predict(model, None, 500, 10)
    adapter.save(tmp_path / FILE, metadata={"base_model": "tiny"})
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    other = unet()
    again = attach(other, lora_rank=4, lora_alpha=3.0, **keys)  # the file's scale differs
    again.init_from(tmp_path / FILE)
    assert_equal(predict(other, None, 500, 10), expected)
    resumed = unet()
    attach(resumed, lora_rank=4, lora_alpha=1.5, **keys).load_state_dict(state)
    assert torch.equal(predict(resumed, None, 500, 10), expected)


def test_the_scale_of_rslora_is_alpha_by_the_root_of_the_rank_and_in_the_factors(tmp_path: Path) -> None:
    model, adapter = trained(use_rslora=True)
    layer = next(each for each in adapter.layers)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        found = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(found, 1.5 / 2 * (x @ a.T @ b.T), rtol=1e-4, atol=1e-6)
    adapter.save(tmp_path / FILE, metadata={})
    with safe_open(tmp_path / FILE, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert header["unet.use_rslora"] is False
    assert header["unet.lora_alpha"] == header["unet.r"] == 4
    path = next(path for path, module in model.named_modules() if module is layer)
    torch.testing.assert_close(stored[f"unet.{path}.lora_B.weight"], b * 0.75)


def test_a_pattern_adapts_the_layers_that_it_matches_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = unet()
    names = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (path.endswith(("attn1.to_q", "attn1.to_k")) or path == "conv_in")
    ]
    with caplog.at_level(logging.INFO):
        adapter = attach(model, lora_rank=2, peft_lora_target_modules=PATTERN)
    assert adapter.num_layers == len(names) > 2
    assert f"matches {len(names)} layers" in caplog.text
    adapter.detach()
    # Other modules beside the layers, and the wrappers that a removed adapter leaves behind.
    with caplog.at_level(logging.INFO):
        again = attach(model, lora_rank=2, peft_lora_target_modules=r".*attn1.*")
    assert again.num_layers == 2 * (len(names) - 1)
    assert f"matches {again.num_layers} layers" in caplog.text


@pytest.mark.parametrize("pattern", [r"attn1\.to_[qk]", r".*atn1.*"])
def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attach(unet(), peft_lora_target_modules=pattern)
    assert f"peft_lora_target_modules: {pattern} " in str(caught.value)
    assert "Attention (" in str(caught.value)
    assert "PEFT" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "spec"),
    [(unet, SDXL), (make_transformer, FLUX), (partial(make_flux2, guidance_embeds=True), FLUX2)],
    ids=["sdxl", "flux", "flux2"],
)
def test_layers_for_sliders_are_there_in_every_family_and_read_no_prompt(make: Any, spec: Any) -> None:
    model = make().requires_grad_(False)
    adapter = attach(model, spec=spec, lora_rank=2, peft_lora_target_modules=spec.slider_targets)
    paths = [path for path, module in model.named_modules() if any(module is each for each in adapter.layers)]
    assert paths
    assert not any("attn2" in path or "add_" in path or "context" in path for path in paths)

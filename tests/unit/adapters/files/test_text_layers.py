"""Layers of text encoders in the files of several programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile
from simpletuner.helpers.adapters.files.text_layers import (
    encoders_in,
    layer_counts,
    text_layers,
    without_encoders,
)
from simpletuner.helpers.adapters.inference import attach_to_encoders
from simpletuner.helpers.errors import AdapterError

WIDTH, RANK, ALPHA = 8, 2, 1.0
PATH = "encoder.layers.1.self_attn.q_proj"
NAMES = ("text_encoder", "text_encoder_2")
SPELLINGS = ("kohya", "diffusers", "diffusers without text_model", "former diffusers")


def encoder(kind: type[nn.Module]) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((RANK, WIDTH), (WIDTH, RANK)))  # type: ignore[return-value]


def file_of(spelling: str) -> AdapterFile:
    """The same layer in both text encoders, at a scale of alpha / rank, beside a layer of a denoiser."""
    down, up = factors()
    tensors = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}
    metadata = {}
    for number, name in enumerate(NAMES, start=1):
        if spelling == "kohya":
            layer = f"lora_te{number}_text_model_{PATH}".replace(".", "_")
            tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            tensors[f"{layer}.alpha"] = torch.tensor(ALPHA)
        elif spelling == "former diffusers":
            layer = f"{name}.text_model.{PATH}.lora_linear_layer"
            tensors |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up * ALPHA / RANK}
        else:
            outer = "" if "without" in spelling else "text_model."
            layer = f"{name}.{outer}{PATH}"
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            metadata |= {f"{name}.lora_alpha": ALPHA, f"{name}.r": RANK}
    return AdapterFile(
        Path("a.safetensors"), tensors, {METADATA_KEY: json.dumps(metadata)} if metadata else {}
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layers_have_the_scale_of_their_program(spelling: str) -> None:
    file, (down, up) = file_of(spelling), factors()
    assert encoders_in(file) == list(NAMES)
    assert layer_counts(file) == dict.fromkeys(NAMES, 1)
    for name in NAMES:
        (layer,) = text_layers(file, name)
        assert (layer.encoder, layer.path) == (name, f"text_model.{PATH}")
        assert torch.equal(layer.down, down)
        torch.testing.assert_close(layer.up, up * ALPHA / RANK)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layers_are_attached_at_their_scale_and_leave_the_model_as_it_was(spelling: str) -> None:
    models = dict(zip(NAMES, map(encoder, (CLIPTextModel, CLIPTextModelWithProjection)), strict=True))
    layers = {
        name: next(layer for path, layer in model.named_modules() if path.endswith(PATH))
        for name, model in models.items()
    }
    x, (down, up) = torch.ones(1, 3, WIDTH), factors()
    before = {name: layer(x) for name, layer in layers.items()}
    attached = attach_to_encoders(file_of(spelling), models, strength=0.5)
    for name, layer in layers.items():
        torch.testing.assert_close(layer(x), before[name] + 0.5 * x @ (up @ down).T * ALPHA / RANK)
        attached[name].detach()
        assert torch.equal(layer(x), before[name])


def test_a_layer_that_does_not_fit_leaves_both_encoders_as_they_were() -> None:
    models = dict(zip(NAMES, map(encoder, (CLIPTextModel, CLIPTextModelWithProjection)), strict=True))
    file = file_of("kohya")
    key = next(key for key in file.tensors if key.startswith("lora_te2") and key.endswith("up.weight"))
    file.tensors[key] = torch.zeros(WIDTH + 1, RANK)
    before = [len(list(model.modules())) for model in models.values()]
    with pytest.raises(AdapterError):
        attach_to_encoders(file, models)
    assert [len(list(model.modules())) for model in models.values()] == before


def test_the_rest_of_a_file_is_what_is_left_without_its_text_encoders() -> None:
    rest = without_encoders(file_of("kohya"), NAMES)
    assert all(key.startswith("lora_unet_") for key in rest.tensors)
    assert encoders_in(without_encoders(file_of("kohya"), ["text_encoder"])) == ["text_encoder_2"]


def test_a_layer_of_another_algorithm_is_refused_by_name() -> None:
    tensors = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_{part}": torch.ones(2, 2)
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    with pytest.raises(AdapterError, match=r"text_encoder .*hada_w1_a"):
        text_layers(AdapterFile(Path("a.safetensors"), tensors, {}), "text_encoder")

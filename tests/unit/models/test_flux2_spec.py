"""What Flux.2 declares, held against the real transformers, which take no memory on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import nn

from simpletuner.helpers.models.flux2.spec import FLAVOURS, SPEC, problems

# Blocks, heads and text width of the released models.
SHAPES = {
    "dev": (8, 48, 48, 15360),
    "klein-base-4b": (5, 20, 24, 7680),
    "klein-base-9b": (8, 24, 32, 12288),
}


def real(flavour: str) -> Flux2Transformer2DModel:
    double, single, heads, width = SHAPES[flavour]
    with torch.device("meta"):
        return Flux2Transformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=width,
            guidance_embeds=FLAVOURS[flavour].has_guidance,
        )


@pytest.mark.parametrize(
    ("flavour", "num_layers"), [("dev", 192), ("klein-base-4b", 100), ("klein-base-9b", 144)]
)
def test_the_generic_targets_are_every_linear_layer_of_every_block(flavour: str, num_layers: int) -> None:
    model = real(flavour)
    classes = [name for alias in SPEC.target_aliases.values() for name in alias.modules]
    targets = [module for module in model.modules() if type(module).__name__ in classes]
    layers = [layer for each in targets for layer in each.modules() if isinstance(layer, nn.Linear)]
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    all_layers = [layer for each in blocks for layer in each.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == num_layers
    assert {id(layer) for layer in layers} == {id(layer) for layer in all_layers}


@pytest.mark.parametrize("flavour", SHAPES)
def test_lora_targets_are_the_attention_layers_of_both_kinds_of_blocks(flavour: str) -> None:
    endings = tuple(f".{name}" for name in SPEC.lora_targets)
    matched = {
        path: type(module) for path, module in real(flavour).named_modules() if f".{path}".endswith(endings)
    }
    assert set(matched.values()) == {nn.Linear}, "PEFT refuses a list of layers"
    kinds = Counter(path.split(".")[0] for path in matched)
    double, single, *_ = SHAPES[flavour]
    assert kinds == {"transformer_blocks": 8 * double, "single_transformer_blocks": 2 * single}


def test_every_flavour_has_a_repository_and_dev_alone_is_told_a_guidance() -> None:
    assert SPEC.flavours["klein-base-9b"] == "black-forest-labs/FLUX.2-klein-base-9B"
    assert [name for name, flavour in FLAVOURS.items() if flavour.has_guidance] == ["dev"]


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"model_flavour": "dev", "flux_guidance_value": 3.0}, set()),
        ({"model_flavour": None, "flux_guidance_value": 3.0}, set()),
        ({"model_flavour": "klein-base-4b", "flux_guidance_value": 1.0}, set()),
        ({"model_flavour": "klein-base-4b", "flux_guidance_value": 3.0}, {"flux_guidance_value"}),
        ({"model_flavour": "klein-9b", "flux_guidance_mode": "random-range"}, {"flux_guidance_mode"}),
        ({"pretrained_vae_model_name_or_path": "/models/vae"}, set()),
        ({"pretrained_vae_model_name_or_path": "/v.safetensors"}, {"pretrained_vae_model_name_or_path"}),
    ],
)
def test_problems_refuses_a_guidance_that_klein_is_not_told_and_what_diffusers_cannot_read(
    values: dict[str, object], wrong: set[str]
) -> None:
    assert problems(values).keys() == wrong

"""The keys of a plain LoRA, letter by letter: for Flux, of one block of each kind in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import nn

from simpletuner.helpers.adapters.files.layouts import Layout, make_key_map, tensors_of
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux2 import spec as flux2

FLUX_BLOCKS = [
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.norm1_context.linear",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.attn.to_add_out",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.0.ff_context.net.0.proj",
    "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.norm.linear",
    "single_transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.proj_out",
]
FLUX_ORIGINAL = [
    "lora_unet_double_blocks_0_img_mod_lin",
    "lora_unet_double_blocks_0_txt_mod_lin",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_double_blocks_0_img_attn_proj",
    "lora_unet_double_blocks_0_txt_attn_qkv",
    "lora_unet_double_blocks_0_txt_attn_proj",
    "lora_unet_double_blocks_0_img_mlp_0",
    "lora_unet_double_blocks_0_img_mlp_2",
    "lora_unet_double_blocks_0_txt_mlp_0",
    "lora_unet_double_blocks_0_txt_mlp_2",
    "lora_unet_single_blocks_0_modulation_lin",
    "lora_unet_single_blocks_0_linear1",
    "lora_unet_single_blocks_0_linear2",
]
FLUX2_BLOCKS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.attn.to_add_out",
    "transformer_blocks.0.ff.linear_in",
    "transformer_blocks.0.ff.linear_out",
    "transformer_blocks.0.ff_context.linear_in",
    "transformer_blocks.0.ff_context.linear_out",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.0.attn.to_out",
]
FLUX2_ORIGINAL = [
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_double_blocks_0_img_attn_proj",
    "lora_unet_double_blocks_0_txt_attn_qkv",
    "lora_unet_double_blocks_0_txt_attn_proj",
    "lora_unet_double_blocks_0_img_mlp_0",
    "lora_unet_double_blocks_0_img_mlp_2",
    "lora_unet_double_blocks_0_txt_mlp_0",
    "lora_unet_double_blocks_0_txt_mlp_2",
    "lora_unet_single_blocks_0_linear1",
    "lora_unet_single_blocks_0_linear2",
]
FLUX = (FluxTransformer2DModel, flux.SPEC, FLUX_BLOCKS, FLUX_ORIGINAL)
FLUX2 = (Flux2Transformer2DModel, flux2.SPEC, FLUX2_BLOCKS, FLUX2_ORIGINAL)
FACTORS = {"diffusers": ["lora_A.weight", "lora_B.weight"]}
THREE = ["lora_down.weight", "lora_up.weight", "alpha"]


@pytest.mark.parametrize("layout", ["diffusers", "lycoris", "kohya", "comfyui"])
@pytest.mark.parametrize(("kind", "spec", "paths", "original"), [FLUX, FLUX2], ids=["flux", "flux2"])
def test_keys_of_one_block_of_each_kind(
    kind: Any, spec: Any, paths: list[str], original: list[str], layout: Layout
) -> None:
    with torch.device("meta"):
        model = kind(num_layers=1, num_single_layers=1)
        layers = [
            LoraLayer(path, torch.empty(1, layer.in_features), torch.empty(layer.out_features, 1), 1.0, 0.0)
            for path, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and "transformer_blocks." in path
        ]
    assert sorted(layer.path for layer in layers) == sorted(paths)
    names = {
        "diffusers": [f"transformer.{path}" for path in paths],
        "lycoris": ["lycoris_" + path.replace(".", "_") for path in paths],
    }.get(layout, original)
    expected = {f"{name}.{part}" for name in names for part in FACTORS.get(layout, THREE)}
    key_map = make_key_map([layer.path for layer in layers], layout, spec)
    with torch.device("meta"):
        assert tensors_of(layers, layout, key_map).keys() == expected

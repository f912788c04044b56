"""The original names of SDXL's layers, against the converter of diffusers."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from simpletuner.helpers.models.sdxl.key_names import original_name


def test_diffusers_converter_gives_every_path_back() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    paths = {path for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert len(paths) == 794, "SDXL has so many linear layers and convolutions"
    state = {}
    for path in paths:
        name = f"lora_unet_{original_name(path)}".replace(".", "_")
        state |= {f"{name}.lora_down.weight": torch.zeros(1, 1), f"{name}.lora_up.weight": torch.zeros(1, 1)}
        state[f"{name}.alpha"] = torch.tensor(1.0)
    assert len(state) == 3 * len(paths), "two layers share a name"
    converted, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    assert {_path(key) for key in converted if key.endswith("down.weight")} == paths


def _path(key: str) -> str:
    """The path in a key; attention layers come back under the names that diffusers once used for them."""
    path = key.removeprefix("unet.").removesuffix(".lora.down.weight")
    path = re.sub(r"\.processor\.(\w+)_lora\.down\.weight$", r".\1", path)
    return f"{path}.0" if path.endswith(".to_out") else path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.resnets.1.conv1", "input_blocks.8.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
            "middle_block.1.transformer_blocks.9.ff.net.2",
        ),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_a_path_becomes_its_original_name(path: str, name: str) -> None:
    assert original_name(path) == name


def test_a_path_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 is not a layer"):
        original_name("transformer_blocks.0")

"""Models of real size without their weight in memory, and a block stack of real width that fits a CPU."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sdxl() -> nn.Module:
    """SDXL's UNet, its linear weights one number seen as a matrix."""
    with torch.device("meta"):
        return without_memory(UNet2DConditionModel(**SDXL))


def flux() -> nn.Module:
    """Flux.1's transformer in the same way."""
    with torch.device("meta"):
        return without_memory(FluxTransformer2DModel(guidance_embeds=True))


def sdxl_stack(*, widths: tuple[int, int] = (320, 640)) -> nn.Module:
    """The outer two thirds of SDXL with one transformer layer a block: real widths, 230 M parameters."""
    shallow = {
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": tuple(width // 64 for width in widths),
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**(SDXL | shallow)).requires_grad_(False).eval()


def without_memory(model: nn.Module) -> nn.Module:
    """Give every linear layer of a model on meta a weight that takes no memory."""
    number = torch.zeros(1, 1, device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
            module.weight = nn.Parameter(number.expand(shape), requires_grad=False)
    return model.requires_grad_(False)

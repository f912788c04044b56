"""The tiny SDXL model as one checkpoint in the layout that SDXL was published in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 2
"""Original blocks per resolution of the tiny UNet: one resnet, and what changes the resolution."""
LAST_RESOLUTION = 3
"""Of the tiny VAE."""
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^add_embedding\.linear_1": "label_emb.0.0",
    r"^add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
}
UNET_BLOCKS = {
    r"^down_blocks\.(\d)\.resnets\.(\d)": lambda i, j: f"input_blocks.{i * BLOCK + j + 1}.0",
    r"^down_blocks\.(\d)\.attentions\.(\d)": lambda i, j: f"input_blocks.{i * BLOCK + j + 1}.1",
    r"^down_blocks\.(\d)\.downsamplers\.(\d)\.conv": lambda i, _: f"input_blocks.{(i + 1) * BLOCK}.0.op",
    r"^mid_block\.(resnets)\.(\d)": lambda _, j: f"middle_block.{2 * j}",
    r"^mid_block\.(attentions)\.(\d)": lambda _, j: f"middle_block.{j + 1}",
    r"^up_blocks\.(\d)\.resnets\.(\d)": lambda i, j: f"output_blocks.{i * BLOCK + j}.0",
    r"^up_blocks\.(\d)\.attentions\.(\d)": lambda i, j: f"output_blocks.{i * BLOCK + j}.1",
    r"^up_blocks\.(\d)\.upsamplers\.(\d)": lambda i, _: f"output_blocks.{i * BLOCK + 1}.2",
}
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"down_blocks\.(\d)\.resnets\.(\d)": r"down.\1.block.\2",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"group_norm": "norm",
    r"to_([qkv])\.": r"\1.",
    r"to_out\.0": "proj_out",
}
OPEN_CLIP = {
    r"^text_model\.encoder\.layers": "transformer.resblocks",
    r"layer_norm1": "ln_1",
    r"layer_norm2": "ln_2",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn": "attn",
    r"^text_model\.embeddings\.token_embedding\.weight": "token_embedding.weight",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_projection\.weight": "text_projection",
}


def save_whole_checkpoint(
    folder: Path, file: Path, *, markers: tuple[str, ...] = (), without: str | None = None
) -> None:
    """Write the model of a folder as one file, with what else such files hold, and without one tensor."""
    tensors = {
        **with_prefix("model.diffusion_model.", unet_tensors(folder)),
        **with_prefix("first_stage_model.", vae_tensors(folder)),
        **with_prefix("conditioner.embedders.0.transformer.", clip_tensors(folder)),
        **with_prefix("conditioner.embedders.1.model.", open_clip_tensors(folder)),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        **{marker: torch.empty(0) for marker in markers},
    }
    if without is not None:
        del tensors[without]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def unet_tensors(folder: Path) -> dict[str, Tensor]:
    return {unet_name(name): tensor for name, tensor in diffusers_tensors(folder / "unet").items()}


def unet_name(name: str) -> str:
    for pattern, place in UNET_BLOCKS.items():
        if match := re.match(pattern, name):
            first = int(match[1]) if match[1].isdigit() else 0
            rest = name[match.end() + 1 :]
            head, _, tail = rest.partition(".")
            rest = f"{RESNET[head]}.{tail}" if "resnets" in name else rest
            return f"{place(first, int(match[2]))}.{rest}"
    return replaced(name, UNET)


def vae_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in diffusers_tensors(folder / "vae").items():
        # The decoder's resolutions are counted from the other end; attention is made of 1 x 1 convolutions.
        match = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)", name)
        if match:
            part = f"block.{match[3]}" if match[3] else "upsample"
            name = f"decoder.up.{LAST_RESOLUTION - int(match[1])}.{part}{name[match.end() :]}"
        is_matrix = ".attentions." in name and tensor.ndim == 2
        tensors[replaced(name, VAE)] = tensor[:, :, None, None] if is_matrix else tensor
    return tensors


def clip_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def open_clip_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "text_encoder_2" / "model.safetensors")
    named = {replaced(name, OPEN_CLIP): tensor for name, tensor in tensors.items()}
    for name in [name for name in named if ".q_proj." in name]:
        parts = [named.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        named[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return named | {"text_projection": named["text_projection"].T}


def diffusers_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def replaced(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, text in patterns.items():
        name = re.sub(pattern, text, name)
    return name

"""T-LoRA as plain LoRA, for programs that know no rank mask: exact at a rank, truncated, or by noise band.

Shapes: R rank of the T-LoRA layer, r rank of the plain LoRA, I in, O out features, k kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.checkpoint import PATHS_KEY, AdapterFile
from simpletuner.helpers.adapters.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora import TLoraLayer
from simpletuner.helpers.errors import AdapterError

Layout = Literal["diffusers", "kohya", "comfyui"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """One layer of a plain LoRA: its delta is `alpha / r * up @ down`."""

    path: str
    """Of the adapted module, with dots."""
    down: Tensor
    """[r, I] or [r, I, k...]."""
    up: Tensor
    """[O, r] or [O, r, 1...]."""
    alpha: float
    error: float
    """Relative difference (Frobenius) to the live adapter's delta at the same rank."""


@dataclass(frozen=True, slots=True)
class Band:
    """Timesteps start..end-1 and the rank that stands for them."""

    start: int
    end: int
    rank: int


def file_layers(file: AdapterFile) -> Iterator[tuple[str, TLoraLayer]]:
    """Module path and T-LoRA layer for every layer of a file, without the model it is for.

    Raises:
        AdapterError: The file is no T-LoRA file, has no base factors, or does not say its modules' paths.
    """
    paths: Mapping[str, str] = json.loads(file.metadata.get(PATHS_KEY, "{}"))
    for name in dict.fromkeys(key.split(".")[0] for key in file.tensors):
        stored = {key: file.tensors.get(f"{name}.{key}") for key in TLoraLayer.weight_list}
        down = stored["lora_down.weight"] if stored["q_layer.weight"] is None else stored["q_layer.weight"]
        up = stored["lora_up.weight"] if stored["p_layer.weight"] is None else stored["p_layer.weight"]
        if stored["tlora_schedule"] is None or down is None or up is None or name not in paths:
            raise AdapterError(
                f"{file.path}: {name} cannot be exported from the file alone: its base factors or its module "
                "path are missing. Load the file on its model and save it again first."
            )
        base = _stand_in(down, up)
        yield paths[name], TLoraLayer.make_module_from_state_dict(name, base, *stored.values())


def exact(path: str, layer: TLoraLayer, *, rank: int) -> PlainLayer:
    """The layer with `rank` ranks open, as a plain LoRA of rank 2 * rank (rank for a vanilla layer)."""
    a, b = (factor.detach() for factor in layer.branch(rank))
    return _plain(path, layer, down=a, up=b, rank=rank)


def truncated(path: str, layer: TLoraLayer, *, rank: int) -> PlainLayer:
    """The best plain LoRA of rank `rank` for the layer with `rank` ranks open.

    Source: Eckart & Young 1936.
    """
    a, b = (factor.detach().double() for factor in layer.branch(rank))
    left, left_upper = torch.linalg.qr(b)
    right, right_upper = torch.linalg.qr(a.flatten(1).T)
    u, s, vh = torch.linalg.svd(left_upper @ right_upper.T)
    root = s[:rank].sqrt()
    down = (root[:, None] * (vh[:rank] @ right.T)).view(rank, *a.shape[1:])
    return _plain(path, layer, down=down.float(), up=(left @ u[:, :rank] * root).float(), rank=rank)


def bands(schedule: RankSchedule, num_bands: int) -> list[Band]:
    """Equal shares of the timesteps, each with the rank of its middle, from the clean end to pure noise.

    Raises:
        ValueError: There are fewer timesteps than bands.
    """
    if not 1 <= num_bands <= schedule.num_timesteps:
        raise ValueError(f"{num_bands} bands: must be in 1..{schedule.num_timesteps}")
    edges = [round(i * schedule.num_timesteps / num_bands) for i in range(num_bands + 1)]
    return [Band(start, end, schedule.rank_at((start + end) // 2)) for start, end in pairwise(edges)]


def layout_tensors(
    layer: PlainLayer, *, layout: Layout, prefix: str, layers_per_block: int = 2
) -> dict[str, Tensor]:
    """The layer's tensors under the keys of a layout.

    Args:
        layer: What `exact` or `truncated` gave.
        layout: "diffusers" (PEFT names), "comfyui" (diffusers' module names behind `lora_unet_` or
            `lora_transformer_`) or "kohya" (SDXL's original block names).
        prefix: "unet" or "transformer".
        layers_per_block: ResNet layers per UNet block, for the block numbers of "kohya".

    Raises:
        AdapterError: The module has no name in the layout.
    """
    alpha = torch.tensor(layer.alpha)
    if layout == "diffusers":
        key = f"{prefix}.{layer.path}"
        return {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up, f"{key}.alpha": alpha}
    path = original_path(layer.path, layers_per_block=layers_per_block) if layout == "kohya" else layer.path
    key = f"lora_{prefix}_{path.replace('.', '_')}"
    return {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up, f"{key}.alpha": alpha}


def original_path(path: str, *, layers_per_block: int) -> str:
    """A module path of diffusers' SDXL UNet under the block names of the original implementation.

    Raises:
        AdapterError: The module is not in an attention block, so the layout has no name for it here.
    """
    stride = layers_per_block + 1
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", path):
        number = stride * int(match[2]) + int(match[3])
        block = f"input_blocks.{number + 1}" if match[1] == "down" else f"output_blocks.{number}"
        return f"{block}.1.{match[4]}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", path):
        return f"middle_block.1.{match[1]}"
    raise AdapterError(f"{path} has no name in the kohya layout. Use the diffusers or comfyui layout.")


def _plain(path: str, layer: TLoraLayer, *, down: Tensor, up: Tensor, rank: int) -> PlainLayer:
    alpha = down.shape[0] * layer.scale  # a loader divides by the rank that it finds
    a, b = (factor.detach().double() for factor in layer.branch(rank))
    live = b @ a.flatten(1)
    gap = up.double() @ down.double().flatten(1) - live
    error = float(gap.norm() / live.norm()) if live.any() else float(gap.norm())
    kernel = (1,) * (down.ndim - 2)
    return PlainLayer(path, down.contiguous(), up.reshape(*up.shape, *kernel).contiguous(), alpha, error)


def _stand_in(down: Tensor, up: Tensor) -> nn.Module:
    """A layer of the right shape and no memory, for factors whose model is not at hand."""
    with torch.device("meta"):
        if down.ndim == 2:
            return nn.Linear(down.shape[1], up.shape[0], bias=False)
        convolution: Callable[..., nn.Module] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[down.ndim]
        return convolution(down.shape[1], up.shape[0], tuple(down.shape[2:]), bias=False)

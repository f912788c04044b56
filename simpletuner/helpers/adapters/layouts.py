"""How tools name the layers and tensors of a plain LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor

from simpletuner.helpers.adapters.peft_lora import METADATA_KEY, described
from simpletuner.helpers.adapters.plain import PlainLayer
from simpletuner.helpers.contracts import FamilyFacts
from simpletuner.helpers.errors import AdapterError

Layout = Literal["diffusers", "kohya", "comfyui", "lycoris"]


def tensors_of(layers: Sequence[PlainLayer], layout: Layout, facts: FamilyFacts) -> dict[str, Tensor]:
    """The layers' tensors under the names of a layout.

    Raises:
        AdapterError: The family has no such layout, or no name for a layer.
    """
    if layout == "diffusers":
        named = {f"{facts.denoiser_name}.{layer.path}": layer for layer in layers}
        return {f"{name}.lora_A.weight": layer.down for name, layer in named.items()} | {
            f"{name}.lora_B.weight": layer.up for name, layer in named.items()
        }
    tensors = {}
    for layer in layers:
        name = _underscored(layer.path, layout, facts)
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def header_of(layers: Sequence[PlainLayer], layout: Layout, facts: FamilyFacts) -> dict[str, str]:
    """What a layout needs in the header: for diffusers, the rank and alpha of each layer."""
    if layout != "diffusers":
        return {}
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float is right at run time
        rank_pattern={layer.path: layer.rank for layer in layers if layer.rank != rank},
        alpha_pattern={layer.path: layer.alpha for layer in layers if layer.alpha != alpha},
        target_modules=[layer.path for layer in layers],
    )
    return {METADATA_KEY: described(config, prefix=facts.denoiser_name)}


def _underscored(path: str, layout: Layout, facts: FamilyFacts) -> str:
    if layout == "lycoris":
        return f"lycoris_{path}".replace(".", "_")
    if facts.original_name is None:
        raise AdapterError(f"The family {facts.name} has no layout {layout}. Use diffusers or lycoris.")
    try:
        return f"lora_unet_{facts.original_name(path)}".replace(".", "_")
    except ValueError as error:
        raise AdapterError(f"The layout {layout} has no name for a layer: {error}. Use diffusers.") from error

"""Key layouts of LoRA files: names of layers and tensors, and layers that a layout fuses.

Shapes: R rank of a layer, I in, O out features.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, layer_name
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.adapters.files.text_layers import OUTER, TextLayer
from simpletuner.helpers.adapters.peft_lora import lora_metadata
from simpletuner.helpers.contracts import FusedSlice, ModelSpec
from simpletuner.helpers.errors import AdapterError

Layout = Literal["diffusers", "kohya", "comfyui", "lycoris"]
KeyMap = Mapping[str, FusedSlice]
Convert = Callable[[str, float], LoraLayer]
DOWN_KEYS = (".lora_A.weight", ".lora_down.weight")


def make_key_map(paths: Iterable[str], layout: Layout, spec: ModelSpec) -> KeyMap:
    """Path of a denoiser's layer -> its name in the layout, with its rows of a fused layer.

    Raises:
        AdapterError: The family has no such layout, or no name for a layer.
    """
    if layout == "diffusers":
        return {path: FusedSlice(f"{spec.denoiser_name}.{path}") for path in paths}
    if layout == "lycoris":
        return {path: FusedSlice(layer_name(path)) for path in paths}
    if spec.original_name is None:
        raise AdapterError(f"The family {spec.name} has no layout {layout}. Use diffusers or lycoris.")
    key_map = {}
    for path in paths:
        try:
            rows = spec.original_name(path)
        except ValueError as error:
            raise AdapterError(
                f"The layout {layout} has no name for a layer: {error}. Use layout diffusers."
            ) from error
        rows = FusedSlice(rows) if isinstance(rows, str) else rows
        name = f"lora_unet_{rows.name}".replace(".", "_")
        key_map[path] = FusedSlice(name, rows.pieces, rows.num_pieces)
    return key_map


def shares_alpha(layout: Layout, spec: ModelSpec) -> bool:
    """Whether all layers need one alpha: diffusers applies a UNet's most frequent one to all attention."""
    return layout in ("kohya", "comfyui") and spec.denoiser_name == "unet"


def with_shared_alpha(
    paths: Iterable[str], convert: Convert, *, layout: Layout, spec: ModelSpec
) -> list[LoraLayer]:
    """The converted layers, all of one alpha where the layout needs that.

    Args:
        paths: Paths of the layers.
        convert: Converts the layer of a path to one of a requested alpha / rank.
        layout: The layout.
        spec: The family.
    """
    layers = [convert(path, 1.0) for path in paths]
    if not shares_alpha(layout, spec):
        return layers
    alpha = max((layer.rank for layer in layers), default=0)
    return [layer if layer.rank == alpha else convert(layer.path, alpha / layer.rank) for layer in layers]


def tensors_of(layers: Sequence[LoraLayer], layout: Layout, key_map: KeyMap) -> dict[str, Tensor]:
    """The layers' tensors under the keys of a layout.

    Raises:
        AdapterError: The shapes of layers that the layout fuses differ.
    """
    parts: dict[str, list[LoraLayer]] = defaultdict(list)
    for layer in layers:
        parts[key_map[layer.path].name].append(layer)
    tensors: dict[str, Tensor] = {}
    for name, group in parts.items():
        down, up, alpha = _joined(group, key_map)
        if layout == "diffusers":
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def header_of(layers: Sequence[LoraLayer], layout: Layout, spec: ModelSpec) -> dict[str, str]:
    """Header entries of a layout: for diffusers, the rank and alpha of each layer."""
    if layout != "diffusers":
        return {}
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0]
    # Without the ^ a pattern also matches every layer whose path ends in it.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float is right at run time
        rank_pattern={f"^{layer.path}": layer.rank for layer in layers if layer.rank != rank},
        alpha_pattern={f"^{layer.path}": layer.alpha for layer in layers if layer.alpha != alpha},
        target_modules=[layer.path for layer in layers],
    )
    return {METADATA_KEY: lora_metadata(config, prefix=spec.denoiser_name)}


def joined_metadata(others: str | None, layers: Sequence[TextLayer]) -> str:
    """PEFT's configuration of these layers as diffusers reads it from a header, with that of other models."""
    joined = json.loads(others or "{}")
    for name in dict.fromkeys(layer.encoder for layer in layers):
        ranks = {
            layer.path.removeprefix(f"{OUTER}."): layer.down.shape[0]
            for layer in layers
            if layer.encoder == name
        }
        rank = Counter(ranks.values()).most_common(1)[0][0]
        own = {path: each for path, each in ranks.items() if each != rank}
        config = LoraConfig(
            r=rank, lora_alpha=rank, rank_pattern=own, alpha_pattern=own, target_modules=list(ranks)
        )
        joined |= json.loads(lora_metadata(config, prefix=name))
    return json.dumps(joined, sort_keys=True)


def _joined(layers: Sequence[LoraLayer], key_map: KeyMap) -> tuple[Tensor, Tensor, float]:
    """Fuse layers to one: their ranks concatenated, each rank writing its own layer's rows.

    Rows of layers that are not adapted stay zero; their number is that of the other layers' pieces.

    Returns:
        down [sum R, I], up [O, sum R] and alpha; unchanged for a layer that is not fused.
    """
    first = key_map[layers[0].path]
    if first.num_pieces == 1:
        assert len(layers) == 1, f"{first.name} stands for {len(layers)} layers"
        return layers[0].down, layers[0].up, layers[0].alpha
    sizes = {(layer.up.shape[0] / len(key_map[layer.path].pieces), layer.down.shape[1]) for layer in layers}
    height = layers[0].up.shape[0] // len(first.pieces)
    if sizes != {(height, layers[0].down.shape[1])}:
        found = ", ".join(f"{layer.path} is {layer.up.shape[0]}x{layer.down.shape[1]}" for layer in layers)
        raise AdapterError(f"{first.name} cannot be fused: {found}. Use layout diffusers.")
    down = torch.cat([layer.down for layer in layers])
    up = down.new_zeros(first.num_pieces, height, down.shape[0])
    start = 0
    for layer in layers:
        pieces = key_map[layer.path].pieces
        up[list(pieces), :, start : start + layer.rank] = layer.up.view(len(pieces), height, layer.rank)
        start += layer.rank
    return down, up.flatten(0, 1), sum(layer.alpha for layer in layers)

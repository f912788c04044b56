"""The alpha of each layer: its own tensor, PEFT's configuration, else the rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.beside import json_beside
from simpletuner.helpers.adapters.files.foreign.keys import ForeignLayers
from simpletuner.helpers.adapters.files.scales import rank_of
from simpletuner.helpers.errors import AdapterError

SIDECAR = "adapter_config.json"  # PEFT's, beside the file


def complete_alphas(file: AdapterFile, foreign: ForeignLayers) -> dict[str, dict[str, Tensor]]:
    """The layers of a file, each with its alpha.

    Raises:
        AdapterError: PEFT's configuration has an alpha that is no number.
    """
    config = _peft_config(file, foreign)
    return {
        layer: parts if "alpha" in parts else parts | _scale(layer, parts, config, path=file.path)
        for layer, parts in foreign.layers.items()
    }


def stated_alpha(layer: str, config: Mapping[str, Any], *, rank: int, path: Path) -> float:
    """Alpha of a layer by PEFT's configuration; its rank where none is stated.

    Args:
        layer: Path of the layer in the denoiser.
        config: The configuration, as from `config_of`.
        rank: Rank of the layer.
        path: The adapter file, for messages.

    Raises:
        AdapterError: It is no finite number.
    """
    alpha = _stated(layer, config, ("lora_alpha", "alpha"), patterns="alpha_pattern", path=path)
    if alpha is None:
        return float(rank)
    # With use_rslora PEFT divides by the root of the rank.
    return alpha * math.sqrt(rank) if config.get("use_rslora") is True else alpha


def config_of(components: Collection[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration of some components, from a header in which each key begins with its component."""
    return {
        key.partition(".")[2]: value for key, value in metadata.items() if key.partition(".")[0] in components
    }


def _scale(
    layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], *, path: Path
) -> dict[str, Tensor]:
    """A layer's alpha, or its first factor with the scale for a LoKr of two whole ones."""
    if "lokr_w1" in parts and "lokr_w2" in parts:
        # LyCORIS reads no scale there; PEFT divides by the rank of its configuration.
        alpha = _stated(layer, config, ("alpha",), patterns="alpha_pattern", path=path)
        rank = _stated(layer, config, ("r",), patterns="rank_pattern", path=path)
        scale = alpha / rank if alpha is not None and rank else 1.0
        return {"lokr_w1": parts["lokr_w1"].float() * scale, "alpha": torch.tensor(1.0)}
    own_rank = rank_of(parts)
    if own_rank is None:
        return {}
    return {"alpha": torch.tensor(stated_alpha(layer, config, rank=own_rank, path=path))}


def _stated(
    layer: str, config: Mapping[str, Any], keys: Sequence[str], *, patterns: str, path: Path
) -> float | None:
    """A layer's number in PEFT's configuration: its own by pattern, else the common one."""
    own = config.get(patterns)
    own = own if isinstance(own, dict) else {}
    common = next((config[key] for key in keys if key in config), None)
    value = next((own[name] for name in own if _names(name, layer)), common)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{path}: {keys[0]} of {layer} is {str(value)[:40]!r}, no finite number.")
    return float(value)


def _names(pattern: str, layer: str) -> bool:
    """Whether a key of PEFT's alpha_pattern names a layer: the whole path after ^, else its end.

    Limit: PEFT matches regular expressions; a stranger's could run for hours, and files hold literal paths.
    """
    literal = pattern.replace("\\.", ".").removesuffix("$")
    if literal.startswith("^"):
        return layer == literal[1:]
    return f".{layer}".endswith(f".{literal}")


def _peft_config(file: AdapterFile, foreign: ForeignLayers) -> Mapping[str, Any]:
    """PEFT's configuration of the denoiser's layers, from the header or beside the file; {} without one."""
    metadata = file.entry(METADATA_KEY)
    if metadata is not None:
        names = {prefix.removesuffix(".") for prefix in foreign.prefixes} | {"unet", "transformer"}
        return config_of(names, metadata)
    if file.is_peft or any(key.startswith("base_model.") for key in file.tensors):
        return json_beside(file.path, SIDECAR) or {}
    return {}

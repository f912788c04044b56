"""Rebuild the network of an adapter file as training built it.

The shapes of a layer's tensors show nearly every option; the header states the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lycoris.modules import get_module, make_module
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.wrapper import LycorisNetwork
from torch import Tensor, nn

from simpletuner.helpers.adapters.files.adapter_file import LYCORIS_KEY, OPTIONS_KEY, AdapterFile, layer_name
from simpletuner.helpers.adapters.quantised import is_quantized
from simpletuner.helpers.adapters.tlora import layer as masked_layers
from simpletuner.helpers.adapters.tlora.masked_layer import MaskedLayer
from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io.names import one_line_reason

masked_layers.register()

# LyCORIS checks neither shapes nor whether a layer's tensors are complete.
MISFITS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)
MAPS = ("module_algo_map", "name_algo_map")
ROTATIONS = (".oft_blocks", ".on_input")
"""Suffixes of keys in layers that under `bypass_mode` change the base layer's bias too."""
UNSCALED = (".a2.weight", ".lokr_w2")
"""Suffixes of keys in layers from which older files leave out the scale of `rs_lora`."""


def network_of(denoiser: nn.Module, file: AdapterFile, tensors: Mapping[str, Tensor]) -> LycorisNetwork:
    """The network of a file, with the layers of the file that the denoiser has, without attaching it.

    Args:
        denoiser: The model to adapt.
        file: The file, for its header.
        tensors: Its tensors under LyCORIS's keys.

    Raises:
        AdapterError: A layer's tensors are of no known algorithm, incomplete or of another size.
    """
    bypassed = layers_with_bypass(file)
    own: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        own[key.partition(".")[0]][key] = tensor
    network = LycorisNetwork(denoiser, init_only=True)
    for path, layer in denoiser.named_modules():
        name = layer_name(path)
        if name not in own:
            continue
        try:
            module = _module(name, layer, own[name])
        except (AdapterError, ConfigError, *MISFITS) as error:
            if any("diff" in key.split(".") for key in own[name]) and is_quantized(layer.weight):
                raise AdapterError(
                    f"{name}: layers of algo full need unquantised weights. Load the model with "
                    "base_model_precision no_change."
                ) from error
            reason = one_line_reason(error).removeprefix(f"{name}: ").rstrip(".")
            raise AdapterError(f"{name}: its factors do not fit this layer: {reason}.") from error
        if bypassed is None or name in bypassed:
            _bypass(module)
        network.loras.append(module)
    return network


def _module(name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module of a layer, with every tensor of the file in it."""
    # Without an alpha it is the rank, and of a rotation there is no constraint: LyCORIS writes both as 0.
    stored = {f"{name}.alpha": torch.tensor(0.0), **tensors}
    kind, parts = get_module(stored, name)
    if kind is None:
        found = ", ".join(sorted(key.partition(".")[2] for key in tensors))
        raise AdapterError(f"{found} are the tensors of no known algorithm")
    if issubclass(kind, MaskedLayer):
        _, parts = get_module(tensors, name)
    module: nn.Module = make_module(kind, parts, name, layer)
    if not isinstance(module, MaskedLayer):
        _check_complete(name, module, tensors)
    return module


def _check_complete(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that the module holds every tensor of the file in its shape; LyCORIS ignores and broadcasts."""
    held = module.state_dict()
    for key, tensor in tensors.items():
        part = key.partition(".")[2]
        if part == "dtype_tensor":
            continue
        if part not in held:
            raise AdapterError(f"{part} is no tensor of this layer's algorithm; it would have no effect")
        found, expected = _shape(tensor), _shape(held[part])
        if found != expected:
            raise AdapterError(f"{part} has shape {found}, here it is {expected}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape without trailing ones, which factors of a convolution may have or not."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _bypass(module: Any) -> None:
    is_grouped = isinstance(module, LoConModule) and module.kw_dict.get("groups", 1) != 1
    if not isinstance(module, MaskedLayer) and not is_grouped:  # LyCORIS's LoCon cannot add there either
        module.bypass_mode = True


def bypass_quantised_layers(path: Path, network: LycorisNetwork) -> None:
    """Bypass quantised layers: add to their output, since packed weights cannot be added to.

    Raises:
        AdapterError: A layer would then do something else than it was trained to.
    """
    for module in network.loras:
        if isinstance(module, MaskedLayer) or not is_quantized(module.org_module[0].weight):
            continue
        algorithm = ALGORITHMS.named(module.name)
        if algorithm is not None and algorithm.needs_dense_weight:
            raise AdapterError(
                f"{path}: {module.name} needs unquantised weights. Load the model with "
                "base_model_precision no_change."
            )
        if reason := _needs_its_weight(module):
            raise AdapterError(
                f"{path}: {module.lora_name} {reason}, which quantised weights do not allow. Load the model "
                "with base_model_precision no_change."
            )
        module.bypass_mode = True


def bypass_rounding(network: LycorisNetwork) -> None:
    """Add a LoRA to the output of layers in half precision, where the weight would round it away."""
    for module in network.loras:
        is_half = module.org_module[0].weight.dtype in (torch.bfloat16, torch.float16)
        if isinstance(module, LoConModule) and is_half and not module.wd:
            module.bypass_mode = True


def _needs_its_weight(module: Any) -> str | None:
    """Why a layer of a file does something else when it adds to the output, as on quantised weights."""
    if isinstance(module, LoConModule | LohaModule | LokrModule) and module.wd:
        return "was trained with weight_decompose"
    if isinstance(module, DiagOFTModule | ButterflyOFTModule) and not module.bypass_mode:
        has_bias = module.org_module[0].bias is not None
        return "rotates the weight and not the bias, as without bypass_mode" if has_bias else None
    return None


def layers_with_bypass(file: AdapterFile) -> Collection[str] | None:
    """Names of the layers trained with `bypass_mode`; None for all of them.

    Raises:
        AdapterError: An older file gives some layers their own `bypass_mode`, which changes what they do to a
            bias, and does not say which layers.
    """
    stated = file.entry(OPTIONS_KEY)
    if stated is None:
        return None if _states(file, "bypass_mode", of=ROTATIONS) else ()
    names = stated.get("bypass_mode")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else ()


def hidden_options(network: LycorisNetwork) -> dict[str, list[str]]:
    """The entry of a file's header for the options that its tensors do not show."""
    bypassed = [module.lora_name for module in network.loras if module.bypass_mode]
    return {"bypass_mode": bypassed} if bypassed else {}


def with_whole_scale(file: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a file, from which an older one leaves out the scale of `rs_lora` in some layers.

    Raises:
        AdapterError: An older file gives some of these layers their own `rs_lora`, and does not say which.
    """
    tensors = dict(file.tensors)
    if file.entry(OPTIONS_KEY) is not None or not _states(file, "rs_lora", of=UNSCALED):
        return tensors
    for name in {key.partition(".")[0] for key in tensors if key.endswith(".alpha")}:
        alpha, first = f"{name}.alpha", f"{name}.lokr_w1"
        if f"{name}.a2.weight" in tensors:  # alpha / sqrt(R) is the scale
            tensors[alpha] = tensors[alpha] * math.sqrt(tensors[f"{name}.a2.weight"].shape[0])
        elif first in tensors and f"{name}.lokr_w2" in tensors:  # alpha is R ** 1.5, the scale sqrt(R)
            rank = float(tensors[alpha]) ** (2 / 3)
            tensors |= {first: tensors[first].float() * math.sqrt(rank), alpha: torch.tensor(rank)}
    return tensors


def _states(file: AdapterFile, option: str, *, of: Sequence[str]) -> bool:
    """Whether an older file's header sets an option that tensors whose keys end like this do not show."""
    if not any(key.endswith(tuple(of)) for key in file.tensors):
        of = ()
    config = file.entry(LYCORIS_KEY) or {}
    value = not is_off(config.get(option))
    preset = config.get("apply_preset")
    maps = [preset.get(key) for key in MAPS] if isinstance(preset, dict) else []
    entries = [entry for each in maps if isinstance(each, dict) for entry in each.values()]
    own = [entry[option] for entry in entries if isinstance(entry, dict) and option in entry]
    if of and any(is_off(each) is value for each in own):
        raise AdapterError(
            f"{file.path}: its header gives some layers their own {option}, and does not say which layers. "
            "Save it again from its last checkpoint with this version."
        )
    return value

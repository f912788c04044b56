"""Convert adapter files of the T-LoRA authors' release to LyCORIS's keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import BASE_KEYS, TRAINED_KEYS, VANILLA_KEYS
from simpletuner.helpers.configuration.schema.lycoris import TLoraInit
from simpletuner.helpers.errors import AdapterError

logger = logging.getLogger(__name__)

# diffusers once kept LoRA layers in the attention processors: "<attention>.processor.to_q_lora.<factor>".
_RELEASED = re.compile(
    r"(?:unet\.|transformer\.)?(?P<attention>.+)\.processor\.(?P<layer>\w+)_lora\.(?P<factor>.+)"
)
_FACTORS = {
    "q_layer.weight": "q_layer.weight",
    "p_layer.weight": "p_layer.weight",
    "lambda_layer": "lambda_layer",
    "base_q.weight": "base_q",
    "base_p.weight": "base_p",
    "base_lambda": "base_lambda",
    "down.weight": "lora_down.weight",
    "up.weight": "lora_up.weight",
}
_IN_A_LIST = {"to_out": "to_out.0"}


def is_released(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the authors' release, or of diffusers' former LoRA."""
    return any(_RELEASED.fullmatch(key) for key in tensors)


def convert_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under LyCORIS's keys, marked as T-LoRA, with alpha R, since their scale is 1.

    Raises:
        AdapterError: A key is unknown, two keys mean the same tensor, or a layer is incomplete.

    Source: https://github.com/ControlGenAI/T-LoRA, the names of its attention processors' parameters.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _RELEASED.fullmatch(key)
        if match is None or match["factor"] not in _FACTORS:
            raise AdapterError(f"{key}: the layout of the authors' release has no such key.")
        name = _IN_A_LIST.get(match["layer"], match["layer"])
        layer = layers.setdefault(f"lycoris_{match['attention']}.{name}".replace(".", "_"), {})
        factor = _FACTORS[match["factor"]]
        if factor in layer:
            raise AdapterError(f"{key}: the file has this tensor twice, under two keys.")
        layer[factor] = tensor[None] if "lambda" in factor and tensor.ndim == 1 else tensor
    result: dict[str, Tensor] = {}
    for name, layer in layers.items():
        init: TLoraInit = "vanilla" if VANILLA_KEYS[0] in layer else "random"
        needed = VANILLA_KEYS if init == "vanilla" else TRAINED_KEYS + BASE_KEYS
        if set(layer) != set(needed):
            different = ", ".join(sorted(set(layer) ^ set(needed)))
            raise AdapterError(f"{name}: needs {', '.join(needed)}; missing or unexpected: {different}.")
        rank = layer[needed[0]].shape[0]
        layer |= {
            "alpha": torch.tensor(float(rank)),
            "tlora_schedule": TLoraSpec(init, "last", None).tensor(rank),
        }
        result |= {f"{name}.{part}": tensor for part, tensor in layer.items()}
    logger.warning(
        "The file has the layout of the T-LoRA authors' release, without a rank schedule, so the defaults "
        "apply: min_rank 1, alpha 1.0; set others in `_tlora_config`. If it is a LoRA in diffusers' former "
        "layout, load it with pipeline.load_lora_weights(...)."
    )
    return result

"""Adapter files in the layout of the T-LoRA authors' release, brought under LyCORIS's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from simpletuner.helpers.adapters.description import Description, TLoraInit
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
_RANK_FIRST = ("q_layer.weight", "lora_down.weight")
_IN_A_LIST = {"to_out": "to_out.0"}


def is_released(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors in the layout of the authors' release, or of diffusers' former LoRA."""
    return bool(tensors) and all(_RELEASED.fullmatch(key) for key in tensors)


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under LyCORIS's keys, marked as T-LoRA, with the alpha that their scale of 1 means.

    Raises:
        AdapterError: A layer that began at singular triplets comes without them.

    Source: https://github.com/ControlGenAI/T-LoRA, the names of its attention processors' parameters.
    """
    result = {}
    for key, tensor in tensors.items():
        match = _RELEASED.fullmatch(key)
        assert match is not None, "is_released comes first"
        layer = _IN_A_LIST.get(match["layer"], match["layer"])
        name = f"lycoris_{match['attention']}.{layer}".replace(".", "_")
        factor = _FACTORS.get(match["factor"], match["factor"])
        result[f"{name}.{factor}"] = tensor[None] if "lambda" in factor and tensor.ndim == 1 else tensor
        if factor == "q_layer.weight" and key.replace("q_layer.weight", "base_q.weight") not in tensors:
            raise AdapterError(
                f"{key}: the base factors of this layer (base_q, base_p, base_lambda) are not in the file, "
                "and nothing tells what they were. Take a file that holds them."
            )
        if factor in _RANK_FIRST:
            rank = tensor.shape[0]
            init: TLoraInit = "vanilla" if factor == "lora_down.weight" else "random"
            result[f"{name}.alpha"] = torch.tensor(float(rank))
            result[f"{name}.tlora_schedule"] = Description(init, "last", None).tensor(rank)
    logger.warning(
        "The file is in the layout of the T-LoRA authors' release, which states no schedule: min_rank 1 and "
        "alpha 1.0 are taken. If it was trained otherwise, set min_rank and alpha in `_tlora_config`; if it "
        "is a plain LoRA in diffusers' former layout, load it with pipeline.load_lora_weights(...)."
    )
    return result

"""What a quantised layer's weight is in plain numbers, which some starts of an adapter need to read.

Shapes: N rows (out), M columns (in, times the kernel for convolutions).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.optional import require


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is stored as codes, or rounded to fewer bits than bf16 has."""
    plain = type(weight) in (Tensor, nn.Parameter)  # a torchao tensor claims the dtype that it had before
    return not plain or not weight.is_floating_point() or weight.element_size() < 2


def dequantize(layer: nn.Module, shape: tuple[int, int], *, name: str) -> Tensor:
    """The [N, M] weight of a layer, unpacked if it is quantised; a weight on meta as it is.

    Args:
        layer: The layer that holds the weight.
        shape: (N, M), which a packed weight does not show.
        name: Of the layer, for the message.

    Raises:
        AdapterError: The weight is packed in a way that is not known here.
    """
    weight = cast(Tensor, layer.weight).detach()
    if weight.is_meta:
        return weight
    try:
        weight = _unpacked(layer, weight)
    except (RuntimeError, AttributeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        raise _unknown(weight, name) from error
    if not weight.is_floating_point() or weight.numel() != shape[0] * shape[1]:
        raise _unknown(weight, name)
    return weight.reshape(shape)


def _unpacked(layer: Any, weight: Tensor) -> Tensor:
    class_name = type(layer.weight).__name__
    if class_name == "Params4bit":
        functional = require("bitsandbytes", extra="quant").functional
        return cast(Tensor, functional.dequantize_4bit(weight.data, layer.weight.quant_state))
    if class_name == "Int8Params" and weight.dtype == torch.int8:
        # bitsandbytes moves the scales from the weight to the layer at its first forward.
        scales = layer.weight.SCB
        scales = layer.state.SCB if scales is None else scales
        return cast(Tensor, weight.float() * (scales.float()[:, None] / 127))
    return weight.dequantize() if class_name not in ("Tensor", "Parameter") else weight


def _unknown(weight: Tensor, name: str) -> AdapterError:
    return AdapterError(
        f"{name}: its weight is packed ({type(weight).__name__}, {weight.dtype}, {tuple(weight.shape)}) and "
        "cannot be read, but this start of the adapter is made from it. Use tlora_init random or vanilla, or "
        "attach the adapter before the model is quantised."
    )

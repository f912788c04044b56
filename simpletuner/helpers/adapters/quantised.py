"""Dequantise a layer's weight, which some initialisations of an adapter read.

Shapes: N rows (out), M columns (in, times the kernel for convolutions).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.optional import require


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is stored as codes or in fewer bits than bf16."""
    plain = type(weight) in (Tensor, nn.Parameter)  # a torchao tensor claims the dtype that it had before
    return not plain or not weight.is_floating_point() or weight.element_size() < 2


def dequantize(layer: nn.Module, shape: tuple[int, int], *, name: str) -> Tensor:
    """The [N, M] weight of a layer, dequantised if necessary; a weight on meta is returned unchanged.

    Args:
        layer: The layer.
        shape: (N, M); a packed weight has another shape.
        name: Name of the layer, for the message.

    Raises:
        AdapterError: The weight's format is unknown.
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
        f"{name}: the format of its weight is unknown ({type(weight).__name__}, {weight.dtype}, "
        f"{tuple(weight.shape)}), and this initialisation reads the weight. Use tlora_init random or "
        "vanilla, or attach the adapter before quantising the model."
    )

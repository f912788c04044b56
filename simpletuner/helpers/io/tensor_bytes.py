"""The bytes of tensors as they stand in safetensors files, without a copy of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simpletuner.helpers.io.safetensors_file import Part

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in a header -> dtype."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, which share its memory."""
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def on_host(tensor: Tensor) -> Tensor:
    """A tensor on the host, contiguous; the same memory where it is so already."""
    tensor = tensor.detach().cpu()
    # A view of one element is contiguous whatever its stride, which bytes cannot have.
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.numel() == 1 else tensor.contiguous()


def parts_of(tensors: Mapping[str, Tensor]) -> list[Part]:
    """Contiguous tensors on the host, large elements first: each starts at a multiple of its element size."""
    named = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    return [(name, NAMES[each.dtype], tuple(each.shape), bytes_of(each)) for name, each in named]

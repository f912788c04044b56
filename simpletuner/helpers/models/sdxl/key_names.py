"""Layer names of the original SDXL checkpoint, for tools outside diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

LAYERS_PER_BLOCK = 2

_OUTSIDE_BLOCKS: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNETS: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACES: tuple[tuple[str, Callable[[int, int], str]], ...] = (
    # An input block is a resnet with its attention; a downsampler is an own block.
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"input_blocks.{_first(i) + j + 1}.0"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"input_blocks.{_first(i) + j + 1}.1"),
    (r"down_blocks\.(\d+)\.downsamplers\.(\d+)\.conv", lambda i, _: f"input_blocks.{_first(i + 1)}.0.op"),
    (r"mid_block\.(resnets)\.(\d+)", lambda _, j: f"middle_block.{2 * j}"),
    (r"mid_block\.(attentions)\.(\d+)", lambda _, j: f"middle_block.{j + 1}"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"output_blocks.{_first(i) + j}.0"),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"output_blocks.{_first(i) + j}.1"),
    # Third after resnet and attention: in SDXL only blocks with attention have upsamplers.
    (r"up_blocks\.(\d+)\.upsamplers\.(\d+)", lambda i, _: f"output_blocks.{_first(i + 1) - 1}.2"),
)


def original_name(path: str) -> str:
    """Original name of the UNet layer at a diffusers path, both with dots.

    Raises:
        ValueError: SDXL's UNet has no such layer.
    """
    if path in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[path]
    for pattern, place in _PLACES:
        if match := re.match(rf"{pattern}(?=\.|$)", path):
            first = int(match[1]) if match[1].isdigit() else 0
            rest = path[match.end() :].removeprefix(".")
            return ".".join(filter(None, (place(first, int(match[2])), _IN_RESNETS.get(rest, rest))))
    raise ValueError(f"{path} is not a layer of SDXL's UNet")


def _first(block: int) -> int:
    return (LAYERS_PER_BLOCK + 1) * block

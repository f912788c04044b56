"""Files as other programs write them, made from factors that are known, and what they must add to a layer.

The names are written out here: names turned round by the package's own tables would prove nothing.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.helpers.models.flux import tiny as tiny_flux
from simpletuner.helpers.models.flux2 import tiny as tiny_flux2
from simpletuner.helpers.models.sdxl import tiny as tiny_sdxl

RANK = 4
MODELS: Mapping[str, Callable[[], Any]] = {
    "sdxl": tiny_sdxl.make_unet,
    "flux": tiny_flux.make_transformer,
    "flux2": lambda: tiny_flux2.make_transformer(guidance_embeds=True),
}
DOWN = "down_blocks.1.attentions.0.transformer_blocks.1"
ATTENTION = "transformer_blocks.1.attn"
# Original name of a layer -> its layers in diffusers, with their share of its rows.
LAYERS: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "sdxl": {
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q": {f"{DOWN}.attn1.to_q": 1},
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k": {f"{DOWN}.attn2.to_k": 1},
        "input_blocks.4.1.transformer_blocks.1.attn1.to_out.0": {f"{DOWN}.attn1.to_out.0": 1},
        "input_blocks.4.1.transformer_blocks.1.ff.net.0.proj": {f"{DOWN}.ff.net.0.proj": 1},
        "middle_block.1.proj_in": {"mid_block.attentions.0.proj_in": 1},
        "output_blocks.1.1.transformer_blocks.0.attn1.to_v": {
            "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v": 1
        },
        "middle_block.0.in_layers.2": {"mid_block.resnets.0.conv1": 1},
        "input_blocks.4.0.emb_layers.1": {"down_blocks.1.resnets.0.time_emb_proj": 1},
        "input_blocks.4.0.skip_connection": {"down_blocks.1.resnets.0.conv_shortcut": 1},
    },
    "flux": {
        "double_blocks.1.img_attn.qkv": {f"{ATTENTION}.to_{name}": 1 for name in "qkv"},
        "double_blocks.1.txt_attn.qkv": {f"{ATTENTION}.add_{name}_proj": 1 for name in "qkv"},
        "double_blocks.1.img_attn.proj": {f"{ATTENTION}.to_out.0": 1},
        "double_blocks.1.txt_attn.proj": {f"{ATTENTION}.to_add_out": 1},
        "double_blocks.0.img_mlp.0": {"transformer_blocks.0.ff.net.0.proj": 1},
        "double_blocks.0.txt_mlp.2": {"transformer_blocks.0.ff_context.net.2": 1},
        "double_blocks.0.img_mod.lin": {"transformer_blocks.0.norm1.linear": 1},
        "single_blocks.1.linear1": {
            **{f"single_transformer_blocks.1.attn.to_{name}": 1 for name in "qkv"},
            "single_transformer_blocks.1.proj_mlp": 4,
        },
        "single_blocks.0.linear2": {"single_transformer_blocks.0.proj_out": 1},
        "single_blocks.0.modulation.lin": {"single_transformer_blocks.0.norm.linear": 1},
    },
    "flux2": {
        "double_blocks.1.img_attn.qkv": {f"{ATTENTION}.to_{name}": 1 for name in "qkv"},
        "double_blocks.1.txt_attn.qkv": {f"{ATTENTION}.add_{name}_proj": 1 for name in "qkv"},
        "double_blocks.1.img_attn.proj": {f"{ATTENTION}.to_out.0": 1},
        "double_blocks.0.img_mlp.0": {"transformer_blocks.0.ff.linear_in": 1},
        "double_blocks.0.txt_mlp.2": {"transformer_blocks.0.ff_context.linear_out": 1},
        "single_blocks.1.linear1": {"single_transformer_blocks.1.attn.to_qkv_mlp_proj": 1},
        "single_blocks.0.linear2": {"single_transformer_blocks.0.attn.to_out": 1},
    },
}


@functools.cache
def _original(family: str) -> Any:
    torch.manual_seed(0)
    return MODELS[family]().requires_grad_(False).eval()


def make(family: str) -> Any:
    """A family's tiny denoiser, the same each time."""
    return copy.deepcopy(_original(family))


@dataclass
class Made:
    """The tensors of a file, and the delta of each layer that it adapts."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, file: Path) -> Path:
        save_file(
            {key: t.contiguous().clone() for key, t in self.tensors.items()},
            file,
            metadata=self.metadata or None,
        )
        return file


Factors = Callable[[int, tuple[int, ...], torch.Generator], tuple[dict[str, Tensor], Tensor]]
"""(rows, (columns, kernel...), generator) -> parts of a layer, and its delta [rows, columns, kernel...]."""


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.3


def lora(rows: int, inputs: tuple[int, ...], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    down = normal(RANK, *inputs, generator=generator)
    up = normal(rows, RANK, generator=generator)
    delta = (up @ down.flatten(1)).view(rows, *inputs)
    return {"lora_down.weight": down, "lora_up.weight": up.view(*up.shape, *(1,) * (len(inputs) - 1))}, delta


def loha(rows: int, inputs: tuple[int, ...], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    size = math.prod(inputs)
    a1, a2 = (normal(rows, RANK, generator=generator) for _ in range(2))
    b1, b2 = (normal(RANK, size, generator=generator) for _ in range(2))
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return parts, ((a1 @ b1) * (a2 @ b2)).view(rows, *inputs)


def lokr(rows: int, inputs: tuple[int, ...], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    w1 = normal(4, 4, generator=generator)
    a, b = (
        normal(rows // 4, 2, generator=generator),
        normal(2, inputs[0] // 4 * math.prod(inputs[1:]), generator=generator),
    )
    delta = torch.kron(w1, (a @ b).view(rows // 4, -1)) if len(inputs) == 1 else None
    if delta is None:
        w2 = (a @ b).view(rows // 4, inputs[0] // 4, *inputs[1:])
        delta = torch.einsum("ab,cdxy->acbdxy", w1, w2).reshape(rows, *inputs)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, delta


def lokr_whole(
    rows: int, inputs: tuple[int, ...], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    w1 = normal(4, 4, generator=generator)
    w2 = normal(rows // 4, inputs[0] // 4, *inputs[1:], generator=generator)
    if len(inputs) == 1:
        return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)
    return {"lokr_w1": w1, "lokr_w2": w2}, torch.einsum("ab,cdxy->acbdxy", w1, w2).reshape(rows, *inputs)


def full(rows: int, inputs: tuple[int, ...], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    delta = normal(rows, *inputs, generator=generator)
    return {"diff": delta}, delta


def shapes_of(model: nn.Module, parts: Mapping[str, int]) -> tuple[int, tuple[int, ...], list[int]]:
    """Rows and inputs of the layer that these are joined to, and each part's rows."""
    weights = [model.get_submodule(path).weight for path in parts]
    heights = [int(weight.shape[0]) for weight in weights]
    return sum(heights), tuple(weights[0].shape[1:]), heights


def original_file(
    family: str, factors: Factors, *, key: Callable[[str, str], str], alpha: float | None = None
) -> Made:
    """A file with the original checkpoint's names; key makes one of a layer's name and part."""
    model, made = make(family), Made()
    generator = torch.Generator().manual_seed(1)
    for name, parts in LAYERS[family].items():
        rows, inputs, heights = shapes_of(model, parts)
        tensors, delta = factors(rows, inputs, generator)
        add(made, name, tensors, alpha=alpha, key=key)
        scale = 1.0 if alpha is None or not is_scaled(tensors) else alpha / rank_in(tensors)
        for path, part in zip(parts, delta.split(heights), strict=True):
            made.deltas[path] = part * scale
    return made


def own_file(
    family: str, factors: Factors, *, key: Callable[[str, str], str], alpha: float | None = None
) -> Made:
    """A file with diffusers' names."""
    model, made = make(family), Made()
    generator = torch.Generator().manual_seed(2)
    for path in (path for parts in LAYERS[family].values() for path in parts):
        rows, inputs, _ = shapes_of(model, {path: 1})
        tensors, delta = factors(rows, inputs, generator)
        add(made, path, tensors, alpha=alpha, key=key)
        made.deltas[path] = delta * (
            1.0 if alpha is None or not is_scaled(tensors) else alpha / rank_in(tensors)
        )
    return made


def add(
    made: Made, name: str, parts: Mapping[str, Tensor], *, alpha: float | None, key: Callable[[str, str], str]
) -> None:
    made.tensors |= {key(name, part): tensor for part, tensor in parts.items()}
    if alpha is not None and "diff" not in parts:
        made.tensors[key(name, "alpha")] = torch.tensor(alpha)


def is_scaled(parts: Mapping[str, Tensor]) -> bool:
    return not {"lokr_w2", "diff"} & set(parts)


def rank_in(parts: Mapping[str, Tensor]) -> int:
    return 2 if "lokr_w1" in parts else RANK


def effect_error(model: nn.Module, path: str, delta: Tensor) -> float:
    """Distance of what a layer adds to its input's product from what this delta adds, relative to it."""
    layer: Any = model.get_submodule(path)
    base = layer.base_layer if isinstance(layer, BaseTunerLayer) else layer
    generator = torch.Generator().manual_seed(3)
    bias = None if base.bias is None else base.bias.double()
    with torch.no_grad():
        if isinstance(base, nn.Conv2d):
            x = torch.randn(2, base.in_channels, 6, 6, generator=generator)
            options: dict[str, Any] = {"stride": base.stride, "padding": base.padding}
            expected = F.conv2d(x.double(), delta.double(), **options)
            plain = F.conv2d(x.double(), base.weight.double(), bias, **options)
        else:
            x = torch.randn(2, 5, base.in_features, generator=generator)
            expected = F.linear(x.double(), delta.double())
            plain = F.linear(x.double(), base.weight.double(), bias)
        return float((layer(x).double() - plain - expected).norm() / expected.norm())


def worst_error(model: nn.Module, made: Made) -> float:
    return max(effect_error(model, path, delta) for path, delta in made.deltas.items())

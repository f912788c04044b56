"""Replacements for LyCORIS layers that fail to train or to load their own files.

The keys of their files stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from lycoris import modules as lycoris_modules
from lycoris import wrapper as lycoris_wrapper
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from torch import Tensor, nn

from simpletuner.helpers.choices.algorithms import ALGORITHMS


class FullLayer(FullModule):  # type: ignore[misc]  # LyCORIS has no type information
    """Float32 differences of a layer's weight and bias, trained beside the frozen layer.

    LyCORIS's layer removes weight and bias, restores them on the CPU and trainable, and always computes in
    float32.
    """

    def __init__(self, lora_name: str, org_module: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(lora_name, org_module, *args, **options)
        # LyCORIS copies them, which doubles the model's memory.
        self._org_weight = [org_module.weight]
        self.org_bias = None if org_module.bias is None else [org_module.bias]

    def apply_to(self, **options: Any) -> None:
        """Add the difference to the layer's output from now on."""
        LycorisBaseModule.apply_to(self, **options)

    def restore(self) -> None:
        """Remove the difference from the layer's output."""
        LycorisBaseModule.restore(self)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The layer's output plus that of the differences, in the layer's dtype."""
        output: Tensor = self.org_forward(x, *args, **options)
        if self.training and self.module_dropout and torch.rand(1) < self.module_dropout:
            return output
        weight, bias = self.get_diff_weight(self.multiplier)
        if self.training and self.rank_dropout:
            keep = (torch.rand(weight.shape[0], device=x.device) > self.rank_dropout).to(weight.dtype)
            if self.rank_dropout_scale:
                keep = keep / keep.mean()
            weight = weight * keep.view(-1, *[1] * (weight.ndim - 1))
            bias = None if bias is None else bias * keep
        bias = None if bias is None else bias.to(x.dtype)
        delta: Tensor = self.op(x, weight=weight.to(x.dtype), bias=bias, **self.kw_dict)
        return output + delta

    def custom_state_dict(self) -> dict[str, Tensor]:
        """The differences under the keys of LyCORIS's files."""
        bias = {} if self.bias is None else {"diff_b": self.bias.data}
        return {"diff": self.weight.data, **bias}

    def load_weight_prehook(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Rename a file's keys to those of the parameters."""
        for key, name in (("diff", "weight"), ("diff_b", "bias")):
            if f"{prefix}{key}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}{key}")


class DyLoraLayer(DyLoraModule):  # type: ignore[misc]
    """A LoRA that trains one block of ranks at a time and uses all of them otherwise.

    LyCORIS's layer draws a rank in every forward, from Python's generator, which gradient checkpointing does
    not rewind; and scales by alpha / blocks, while its reader of files scales by alpha / ranks.
    """

    def get_random_rank_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of the blocks up to a random one, which is trained; of all blocks in eval mode."""
        last = int(torch.randint(self.block_count, ())) if self.training else self.block_count - 1
        return self.get_weight(last * self.block_size)

    def get_weight(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of the first ranks and of the block after them, and the scale of their product."""
        down, up, scale = super().get_weight(rank)
        return down, up, scale / self.block_size

    def custom_state_dict(self) -> dict[str, Tensor]:
        """All blocks as the factors of one LoRA, a convolution's in its kernel's shape."""
        state: dict[str, Tensor] = super().custom_state_dict()
        up = state["lora_up.weight"]
        return state | {"lora_up.weight": up.view(*up.shape, *[1] * (len(self.shape) - 2))}

    def load_weight_prehook(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Split a file's factors into blocks."""
        for key, name, dim in (("lora_up.weight", "up_list", 1), ("lora_down.weight", "down_list", 0)):
            if f"{prefix}{key}" in state_dict:
                factor = state_dict.pop(f"{prefix}{key}").flatten(1)
                blocks = torch.split(factor, self.block_size, dim)
                state_dict.update({f"{prefix}{name}.{i}": block for i, block in enumerate(blocks)})


class GLoraLayer(GLoRAModule):  # type: ignore[misc]
    """LyCORIS's layer with the weight cast to the factors' dtype before their product."""

    @property
    def org_weight(self) -> Tensor:
        """The layer's weight in the factors' dtype."""
        weight: Tensor = self.org_module[0].weight
        return weight.to(self.a1.weight.dtype)

    @org_weight.setter
    def org_weight(self, value: Tensor) -> None:
        self.org_module[0].weight.data.copy_(value)


class IA3Layer(IA3Module):  # type: ignore[misc]
    """LyCORIS's layer, made from the two tensors of its files."""

    @classmethod
    def make_module_from_state_dict(cls, lora_name: str, orig_module: nn.Module, *weights: Tensor) -> Self:
        """Make a layer from a file's tensors."""
        weight, on_input = weights
        layer = cls(lora_name, orig_module, train_on_input=bool(on_input))
        layer.weight.data.copy_(weight)
        return layer


REPLACED: Mapping[type[nn.Module], type[nn.Module]] = {
    FullModule: FullLayer,
    DyLoraModule: DyLoraLayer,
    GLoRAModule: GLoraLayer,
    IA3Module: IA3Layer,
}
"""LyCORIS's layer -> its replacement when a file is read."""


def register() -> None:
    """Replace LyCORIS's layers in the lists by which it creates layers and reads files."""
    lycoris_modules.MODULE_LIST[:] = [REPLACED.get(each, each) for each in lycoris_modules.MODULE_LIST]
    table = lycoris_wrapper.network_module_dict
    table.update({name: REPLACED.get(layer, layer) for name, layer in table.items()})


def register_algorithms(names: Iterable[str]) -> None:
    """Enter the layers of these algorithms' records into the table of LyCORIS's wrapper."""
    lycoris_wrapper.network_module_dict.update({name: ALGORITHMS[name].load() for name in names})

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
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.errors import AdapterError


class _Decomposable:
    """Mixin before a LyCORIS module that `weight_decompose` splits into direction and magnitude (DoRA).

    LyCORIS's reader of files takes every magnitude for one of outputs, so it refuses those of inputs.
    """

    shape: tuple[int, ...]

    @classmethod
    def make_module_from_state_dict(
        cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None
    ) -> Self:
        """Make a layer from a file's tensors, of which the last is the magnitude or None."""
        *factors, magnitude = weights
        layer: Self = super().make_module_from_state_dict(  # type: ignore[misc]
            lora_name, orig_module, *factors, None
        )
        layer.take_magnitude(magnitude)
        return layer

    def take_magnitude(self, magnitude: Tensor | None) -> None:
        """Take a file's `dora_scale`, [O, 1, ...] or [1, I, ...], whose shape says what it belongs to.

        Raises:
            AdapterError: It has another shape.
        """
        if magnitude is None:
            return
        ones = (1,) * (len(self.shape) - 1)
        of_outputs, of_inputs = (self.shape[0], *ones), (1, self.shape[1], *ones[1:])
        if magnitude.shape not in (of_outputs, of_inputs):
            raise AdapterError(
                f"dora_scale has shape {tuple(magnitude.shape)}; weight_decompose gives {of_outputs} here, "
                f"and with wd_on_out false {of_inputs}"
            )
        self.wd, self.wd_on_out = True, magnitude.shape == of_outputs
        self.dora_norm_dims = len(ones)
        self.dora_scale = nn.Parameter(magnitude.detach().float().clone())


class LoConLayer(_Decomposable, LoConModule):  # type: ignore[misc]  # LyCORIS has no type information
    """LyCORIS's layer, which also reads files with a magnitude for each input."""


class LohaLayer(_Decomposable, LohaModule):  # type: ignore[misc]
    """LyCORIS's layer, which also reads files with a magnitude for each input."""

    def get_diff_weight(
        self, multiplier: float = 1, shape: Any = None, device: torch.device | None = None
    ) -> tuple[Tensor, None]:
        """The delta of the weight, for merging; LyCORIS's applies alpha / rank twice and no scalar."""
        return self.get_weight(shape).to(device) * self.scalar.to(device) * multiplier, None


class LokrLayer(_Decomposable, LokrModule):  # type: ignore[misc]
    """A Kronecker product made from the factors of its file, whatever options gave them their shapes.

    LyCORIS guesses the options from the shapes: wrongly for `unbalanced_factorization`, `use_tucker` and some
    sizes. With both factors whole its file has no place for the scale of `rs_lora`; here the first factor
    holds it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.is_whole:
            self.alpha = torch.tensor(float(self.lora_dim))

    @property
    def is_whole(self) -> bool:
        """Whether neither factor is split at the rank."""
        return bool(self.use_w1 and self.use_w2)

    @classmethod
    def make_module_from_state_dict(
        cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None
    ) -> Self:
        """Make a layer from a file's tensors.

        Raises:
            AdapterError: They are no two factors, or their product has not the layer's size.
        """
        given = {key: each for key, each in zip(cls.weight_list, weights, strict=True) if each is not None}
        magnitude, alpha = given.pop("dora_scale", None), given.pop("alpha")
        layer = cls(lora_name, orig_module, 1.0, 1, 1.0, full_matrix=True)
        layer._take_factors(given, float(alpha))
        layer.take_magnitude(magnitude)
        return layer

    def _take_factors(self, factors: Mapping[str, Tensor], alpha: float) -> None:
        keys = set(factors)
        if keys not in _LOKR_FACTORS:
            raise AdapterError(f"{', '.join(sorted(keys))} are no two factors of a Kronecker product")
        rows, columns = _kronecker_size(factors)
        if (rows, columns) != (self.shape[0], torch.Size(self.shape[1:]).numel()):
            raise AdapterError(f"its factors make a {rows}x{columns} matrix")
        del self.lokr_w1, self.lokr_w2
        for key, factor in factors.items():
            self.register_parameter(key, nn.Parameter(factor.detach().float().clone()))
        self.use_w1, self.use_w2, self.tucker = "lokr_w1" in keys, "lokr_w2" in keys, "lokr_t2" in keys
        split = [factors[key] for key in ("lokr_w1_b", "lokr_w2_b") if key in keys]
        self.lora_dim = split[0].shape[0] if split else 1
        self.full_matrix = not split
        alpha = alpha or float(self.lora_dim)
        self.scale = alpha / self.lora_dim if split else 1.0
        self.alpha = torch.tensor(alpha)

    def custom_state_dict(self) -> dict[str, Tensor]:
        """The factors under the keys of LyCORIS's files, which are read with scale 1 if both are whole."""
        state: dict[str, Tensor] = super().custom_state_dict()
        if self.is_whole and self.scale != 1:
            state |= {"lokr_w1": state["lokr_w1"] * self.scale, "alpha": torch.tensor(float(self.lora_dim))}
        return state

    def load_weight_prehook(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Take the scale out of a file's first factor."""
        key = f"{prefix}lokr_w1"
        if self.is_whole and self.scale != 1 and key in state_dict:
            state_dict[key] = state_dict[key] / self.scale

    def get_diff_weight(
        self, multiplier: float = 1, shape: Any = None, device: torch.device | None = None
    ) -> tuple[Tensor, None]:
        """The delta of the weight, for merging; LyCORIS's applies alpha / rank twice and no scalar."""
        return self.get_weight(shape).to(device) * self.scalar.to(device) * multiplier, None


_LOKR_FACTORS = [
    {*first, *second}
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
]


def _kronecker_size(factors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns (times the kernel) of the product of a file's factors."""
    rows, columns = 1, 1
    for name in ("lokr_w1", "lokr_w2"):
        if name in factors:
            rows, columns = rows * factors[name].shape[0], columns * factors[name][0].numel()
            continue
        first, second = factors[f"{name}_a"], factors[f"{name}_b"]
        core = factors.get("lokr_t2") if name == "lokr_w2" else None
        # A Tucker decomposition has its rank first in both of its matrices.
        rows *= first.shape[0 if core is None else 1]
        columns *= second.shape[1] * (1 if core is None else core[0, 0].numel())
    return rows, columns


class FullLayer(FullModule):  # type: ignore[misc]
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
    """LyCORIS's layer with the weight cast to the factors' dtype before their product.

    LyCORIS leaves the scale of `rs_lora` out of its files, and keeps the ranks that `rank_dropout` drops.
    """

    rank_dropout: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.rs_lora:
            self.alpha = torch.tensor(self.scale * self.lora_dim)
        self.rank_dropout = _kept_instead(self.rank_dropout)

    def custom_state_dict(self) -> dict[str, Tensor]:
        """The factors under the keys of LyCORIS's files, read with the scale alpha / rank."""
        state: dict[str, Tensor] = super().custom_state_dict()
        return state | {"alpha": torch.tensor(self.scale * self.lora_dim)} if self.rs_lora else state

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


class NormLayer(NormModule):  # type: ignore[misc]
    """LyCORIS's layer, which keeps the channels that `rank_dropout` drops.

    LyCORIS fails on a layer without weight or bias; this one is `not_supported`.
    """

    rank_dropout: float

    def __init__(self, lora_name: str, org_module: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(lora_name, org_module, *args, **options)
        own = dict(org_module.named_parameters(recurse=False))
        if not {"weight", "bias"} <= own.keys():
            self.not_supported = True
        self.rank_dropout = _kept_instead(self.rank_dropout)


def _kept_instead(rank_dropout: float) -> float:
    return 1 - rank_dropout if rank_dropout else 0.0


REPLACED: Mapping[type[nn.Module], type[nn.Module]] = {
    LoConModule: LoConLayer,
    LohaModule: LohaLayer,
    LokrModule: LokrLayer,
    NormModule: NormLayer,
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

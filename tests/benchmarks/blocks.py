"""One block of each kind, as diffusers makes it, and what it keeps for its backward pass.

Shapes: B batch, N image tokens, L text tokens, D width, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import (
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.checkpointing.optimizer_state import num_state_bytes
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.models.flux import memory as flux
from simpletuner.helpers.models.flux.spec import SPEC as FLUX
from simpletuner.helpers.models.flux2 import memory as flux2
from simpletuner.helpers.models.flux2.spec import SPEC as FLUX2
from simpletuner.helpers.models.memory_model import Arithmetic, Block, Layer, LowRank, Step
from simpletuner.helpers.models.sdxl import memory as sdxl
from simpletuner.helpers.models.sdxl.spec import SPEC as SDXL

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    batch: int
    edge: int
    """N is its square."""
    text: int
    width: int
    context: int = 2048
    """Width of the text in a UNet."""
    head: int = 64
    groups: int = 32

    @property
    def image(self) -> int:
        return self.edge**2

    @property
    def heads(self) -> int:
        return self.width // self.head


@dataclass(frozen=True)
class Kind:
    """A kind of block."""

    module: Callable[[Shape], nn.Module]
    inputs: Callable[[Shape], dict[str, Any]]
    block: Callable[[Shape], Block]
    spec: ModelSpec
    path: str
    """Its place in a denoiser."""
    streams: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    """Inputs that the block before it made."""


def _rotary(shape: Shape) -> tuple[Tensor, Tensor]:
    size = shape.text + shape.image, shape.head
    return torch.randn(size), torch.randn(size)


def _sizes(shape: Shape) -> dict[str, int]:
    return {"image": shape.image, "text": shape.text, "width": shape.width, "heads": shape.heads}


def _streams(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(shape.batch, shape.image, shape.width),
        "encoder_hidden_states": torch.randn(shape.batch, shape.text, shape.width),
        "image_rotary_emb": _rotary(shape),
    }


def _one_stream(shape: Shape) -> dict[str, Any]:
    tokens = shape.text + shape.image
    return {
        "hidden_states": torch.randn(shape.batch, tokens, shape.width),
        "encoder_hidden_states": None,
        "image_rotary_emb": _rotary(shape),
        "temb_mod": torch.randn(shape.batch, 3 * shape.width),
    }


KINDS: Mapping[str, Kind] = {
    "SDXL transformer": Kind(
        module=lambda s: BasicTransformerBlock(s.width, s.heads, s.head, cross_attention_dim=s.context),
        inputs=lambda s: {
            "hidden_states": torch.randn(s.batch, s.image, s.width),
            "encoder_hidden_states": torch.randn(s.batch, s.text, s.context),
        },
        block=lambda s: sdxl.transformer_block(
            tokens=s.image, text=s.text, width=s.width, heads=s.heads, context=s.context
        ),
        spec=SDXL,
        path="transformer_blocks",
        streams=("hidden_states",),
    ),
    "SDXL residual": Kind(
        module=lambda s: ResnetBlock2D(
            in_channels=2 * s.width, out_channels=s.width, temb_channels=4 * s.width, groups=s.groups
        ),
        inputs=lambda s: {
            "input_tensor": torch.randn(s.batch, 2 * s.width, s.edge, s.edge),
            "temb": torch.randn(s.batch, 4 * s.width),
        },
        block=lambda s: sdxl.resnet_block(
            2 * s.width, s.width, positions=s.image, time=4 * s.width, groups=s.groups
        ),
        spec=SDXL,
        path="resnets",
        streams=("input_tensor",),
    ),
    "Flux.1 double": Kind(
        module=lambda s: FluxTransformerBlock(s.width, s.heads, s.head),
        inputs=lambda s: _streams(s) | {"temb": torch.randn(s.batch, s.width)},
        block=lambda s: flux.double_block(**_sizes(s)),
        spec=FLUX,
        path="transformer_blocks",
    ),
    "Flux.1 single": Kind(
        module=lambda s: FluxSingleTransformerBlock(s.width, s.heads, s.head),
        inputs=lambda s: _streams(s) | {"temb": torch.randn(s.batch, s.width)},
        block=lambda s: flux.single_block(**_sizes(s)),
        spec=FLUX,
        path="single_transformer_blocks",
    ),
    "Flux.2 double": Kind(
        module=lambda s: Flux2TransformerBlock(s.width, s.heads, s.head),
        inputs=lambda s: (
            _streams(s)
            | {each: torch.randn(s.batch, 6 * s.width) for each in ("temb_mod_img", "temb_mod_txt")}
        ),
        block=lambda s: flux2.double_block(**_sizes(s)),
        spec=FLUX2,
        path="transformer_blocks",
    ),
    "Flux.2 single": Kind(
        module=lambda s: Flux2SingleTransformerBlock(s.width, s.heads, s.head),
        inputs=_one_stream,
        block=lambda s: flux2.single_block(**_sizes(s)),
        spec=FLUX2,
        path="single_transformer_blocks",
    ),
}
TRAININGS = ("whole", "peft", "tlora", "tlora on all")


@dataclass(frozen=True)
class Case:
    """One block in training."""

    kind: str
    shape: Shape
    training: str
    """The whole block, LoRA on attention, T-LoRA on attention and feed-forward, or T-LoRA on all layers; or
    LoRA of LyCORIS on the layers of T-LoRA, which it merges into the weights."""
    arithmetic: Arithmetic
    rank: int

    @property
    def step(self) -> Step:
        """The same for the memory model."""
        return Step(arithmetic=self.arithmetic, batch_size=self.shape.batch, adapter=self._low_rank)

    @property
    def _low_rank(self) -> LowRank | None:
        if self.training == "whole":
            return None
        if self.training == "merged lora":
            return LowRank(rank=self.rank, is_tlora=False, adapts=lambda layer: layer.is_target, merges=True)
        if self.training.startswith("tlora"):
            return LowRank(rank=self.rank, is_tlora=True, adapts=self.has_lycoris)
        return LowRank(
            rank=self.rank, is_tlora=False, adapts=lambda layer: layer.name.endswith(self.peft_targets)
        )

    def has_lycoris(self, layer: Layer) -> bool:
        """Whether an adapter of LyCORIS is on this layer."""
        return layer.is_target or self.training == "tlora on all"

    @property
    def peft_targets(self) -> tuple[str, ...]:
        """Names of the layers that LoRA adapts."""
        return ("to_qkv_mlp_proj", "to_out") if self.kind == "Flux.2 single" else ATTENTION


@dataclass(frozen=True)
class Measured:
    """Bytes of one block in training."""

    weights: int
    """Of the block without its adapter."""
    adapter: int
    """Of the adapter's trained parameters."""
    gradients: int
    """Of the trained parameters, after the backward pass."""
    kept: int
    """Between forward and backward."""
    entering: int
    """The same with gradient checkpointing."""
    peak: int
    """Most in forward and backward beside weights and inputs; 0 if it was not measured."""
    states: int
    """Of AdamW after a step; 0 if it was not measured."""
    trained: tuple[tuple[int, ...], ...]
    """Shapes of the trained parameters."""


class GpuNorms(TorchFunctionMode):
    """Norms as on a GPU under autocast: in float32, and an RMS norm keeps its input alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.group_norm):
            args = tuple(map(_in_float32, args))
            kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        if func is F.rms_norm:
            return FusedRmsNorm.apply(args[0].float(), kwargs["weight"].float(), kwargs["eps"])
        return func(*args, **kwargs)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


class FusedRmsNorm(torch.autograd.Function):
    """An RMS norm over the last axis that keeps its input, its weight and a number for each row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(values, weight, scale)
        return values * scale * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, weight, scale = ctx.saved_tensors
        normalised, weighted = values * scale, gradients[0] * weight
        own = scale * (weighted - normalised * (weighted * normalised).mean(-1, keepdim=True))
        return own, (gradients[0] * normalised).flatten(0, -2).sum(0), None


class KeptTensors:
    """Counts what autograd saves, each storage once."""

    def __init__(self, others: list[Tensor]) -> None:
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._found: dict[int, Tensor] = {}

    def note(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._others:
            self._found[key] = tensor  # held, so that no other storage gets its address
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages but the given tensors'."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())


class LivePeak(TorchDispatchMode):
    """The most bytes that new tensors had at once."""

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()
        self._others = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in others}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._others:
                    self._live[reference.cdata] = reference, storage.nbytes()
        self.num_bytes = max(self.num_bytes, sum(size for _, size in self._live.values()))
        return result


def measure(case: Case, *, with_peak: bool = False, with_states: bool = False) -> Measured:
    """Run a block forward and backward, with and without recomputing."""
    torch.manual_seed(0)
    kind, arithmetic = KINDS[case.kind], case.arithmetic
    dtype = torch.bfloat16 if arithmetic.is_mixed else torch.float32
    is_whole = case.training == "whole"
    block = kind.module(case.shape).to(dtype).requires_grad_(is_whole).train()
    weights = num_bytes(block.parameters())
    inputs = {name: _as_trained(value, dtype) for name, value in kind.inputs(case.shape).items()}
    streams = {name: inputs.pop(name) for name in kind.streams if inputs.get(name) is not None}
    for tensor in (*streams.values(), *_modulation(inputs, kind) * is_whole):
        tensor.requires_grad_()
    with ExitStack() as active:
        model = nn.ModuleDict({kind.path: nn.ModuleList([block])})
        _adapt(model, case, active)
        trained = [weight for weight in block.parameters() if weight.requires_grad]
        active.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=arithmetic.is_mixed))
        if arithmetic.is_gpu and arithmetic.is_mixed:
            active.enter_context(GpuNorms())
        others = [*model.parameters(), *model.buffers(), *_tensors(inputs.values())]

        def run(*values: Tensor) -> Any:
            return block(**dict(zip(streams, values, strict=True)), **inputs)

        kept, entering = KeptTensors(others), KeptTensors(others)
        with saved_tensors_hooks(kept.note, lambda tensor: tensor):
            run(*streams.values())
        sizes = kept.num_bytes
        del kept
        peak = LivePeak([*others, *streams.values()])
        with peak if with_peak else nullcontext():
            outputs = _tensors([run(*streams.values())])
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
        del outputs
        with saved_tensors_hooks(entering.note, lambda tensor: tensor):
            checkpoint(run, *streams.values(), use_reentrant=False)
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    return Measured(
        weights=weights,
        adapter=0 if is_whole else num_bytes(trained),
        gradients=num_bytes(gradients),
        kept=sizes,
        entering=entering.num_bytes,
        peak=peak.num_bytes,
        states=_state_bytes(trained) if with_states else 0,
        trained=tuple(tuple(weight.shape) for weight in trained),
    )


def _state_bytes(trained: list[nn.Parameter]) -> int:
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    return num_state_bytes(optimizer)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _adapt(model: nn.ModuleDict, case: Case, active: ExitStack) -> None:
    """Attach the adapter; a T-LoRA's mask is set while `active` is open."""
    if case.training == "peft":
        inject_adapter_in_model(LoraConfig(r=case.rank, target_modules=[*case.peft_targets]), model)
    if "lora" in case.training:
        layers = KINDS[case.kind].block(case.shape).layers
        names = [rf".*\.{re.escape(layer.name)}$" for layer in layers if case.has_lycoris(layer)]
        is_tlora = case.training.startswith("tlora")
        values = {"multiplier": 1.0, "linear_dim": case.rank, "linear_alpha": 1.0}
        values |= {"algo": "tlora", "tlora_min_rank": case.rank} if is_tlora else {"algo": "lora"}
        config = LycorisConfig.model_validate(
            {**values, "apply_preset": {"target_name": names}, "raw": values}
        )
        adapter = LycorisAdapter.create(model, config, spec=KINDS[case.kind].spec, seed=0)
        if is_tlora:
            active.enter_context(adapter.rank_mask_for([500] * case.shape.batch))
            # Layers of real width are formed alone; small ones keep as much, but not all where hooks see it.
            for each in mask.mask_group(adapter.group).masks.values():
                each.formed = None
    for weight in model.parameters():
        if weight.requires_grad and case.training != "whole":
            weight.data = weight.data.float()


def _as_trained(value: Any, dtype: torch.dtype) -> Any:
    """An input in the format of the run; rotations stay in float32."""
    return value.to(dtype) if isinstance(value, Tensor) else value


def _modulation(inputs: Mapping[str, Any], kind: Kind) -> list[Tensor]:
    """Inputs that need gradients if the whole model is trained: what is made from the timestep."""
    return [value for name, value in inputs.items() if name.startswith("temb")]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors of values and tuples of values."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += _tensors(value)
    return found

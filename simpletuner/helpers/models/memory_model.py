"""Memory and arithmetic of a training step, counted from a denoiser's layers. Imports no torch.

A block keeps for its backward pass what its operations read there: the inputs of norms and activations, the
tensors of attention, and the inputs of linear layers whose weights, or whose adapters, are trained.
`documentation/memory.md` has the formulas.

Shapes: B batch, N image tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt, prod
from typing import Any, Literal, Protocol

from simpletuner.helpers.choices.precisions import KEPT_IN_NAMES, TILE, Precision
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.models.component_memory import TextEncoder

Shape = tuple[int, ...]

FLOAT32 = 4
MIXED = 2
"""Bytes of a number in bfloat16 and float16."""

Role = Literal["compute", "norm", "float32", "cast", "uncast", "modulated", "modulated norm", "normalised"]
"""Who keeps an activation, in which format:

- compute: every run, in the format of the layers.
- norm: every run, in the format of layer and group norms.
- float32: every run, in float32.
- cast: a float32 copy that a run in mixed precision keeps beside the original.
- uncast: the original of a "norm" copy, where the two formats differ.
- modulated: a run that trains what the timestep multiplies it with, which is the whole model or adapters on
  the layers of the modulation; in the format of the layers.
- modulated norm: the same, in the format of norms.
- normalised: a run of the whole model on a CPU, whose RMS norms are several operations; float32.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Formats of a run on one kind of device."""

    is_mixed: bool
    """Whether layers compute in 16 bits under autocast."""
    is_gpu: bool
    """A GPU's autocast computes norms in float32, a CPU's in 16 bits."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in linear layers, convolutions and attention."""
        return MIXED if self.is_mixed else FLOAT32

    @property
    def norm_bytes(self) -> int:
        """Bytes of a number in layer and group norms."""
        return FLOAT32 if self.is_gpu else self.compute_bytes

    @property
    def norms_cast(self) -> bool:
        """Whether norms compute in another format than the layers."""
        return self.norm_bytes != self.compute_bytes


@cache
def bytes_of_roles(arithmetic: Arithmetic, *, is_whole: bool, is_modulated: bool) -> Mapping[Role, int]:
    """Role -> bytes kept for each number of an activation; 0 if it is not kept.

    Args:
        arithmetic: Formats of the run.
        is_whole: Whether the whole model is trained.
        is_modulated: Whether the factors that the timestep gives need gradients.
    """
    compute, norm = arithmetic.compute_bytes, arithmetic.norm_bytes
    return {
        "compute": compute,
        "norm": norm,
        "float32": FLOAT32,
        "cast": FLOAT32 if arithmetic.is_mixed else 0,
        "uncast": compute if arithmetic.norms_cast else 0,
        "modulated": compute if is_modulated else 0,
        "modulated norm": norm if is_modulated else 0,
        "normalised": FLOAT32 if is_whole and not arithmetic.is_gpu else 0,
    }


@dataclass(frozen=True, slots=True)
class Kept:
    """An activation that a block keeps, beside the inputs of its linear layers."""

    name: str
    numbers: int
    """Numbers for one sample."""
    role: Role = "compute"


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer, or a convolution."""

    name: str
    """Its path in the block."""
    inputs: int
    outputs: int
    rows: int
    """Tokens, or positions of its input, of one sample."""
    source: str = ""
    """Its input: layers with the same one share it.

    "norm..." is the output of a norm, "silu..." that of the time embedding, which makes the modulation,
    "part..." a part of the tokens of another tensor, and a copy unless the batch is one sample. "" is counted
    elsewhere: a convolution keeps its input in every run, and the text belongs to no block."""
    kernel: int = 1
    """Positions that a convolution reads for one output."""
    has_bias: bool = True
    is_convolution: bool = False
    reads_text: bool = False
    """Its input is the text, which needs no gradient."""
    is_target: bool = True
    """Whether the adapter targets Attention and FeedForward select it."""
    stride: int = 1
    """Of a convolution: `rows` are positions of its input, of which it makes one in stride x stride."""

    @property
    def num_weights(self) -> int:
        """Weights and biases."""
        return sum(map(prod, self.shapes))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of weight and bias."""
        weight = (self.outputs, self.inputs, *self.kernel_shape)
        return (weight, (self.outputs,)) if self.has_bias else (weight,)

    @property
    def flops(self) -> int:
        """Multiplications and additions for one sample."""
        return 2 * (self.rows // self.stride**2) * self.inputs * self.outputs * self.kernel

    @property
    def kernel_shape(self) -> Shape:
        """Height and width of a convolution's kernel; nothing for a linear layer."""
        return (isqrt(self.kernel),) * 2 if self.is_convolution else ()

    def bytes_saved_by(self, precision: Precision, *, unquantised: int) -> float:
        """Bytes that its quantised weight is smaller; 0 for a layer that stays as it is."""
        per_weight = precision.bytes_per_weight
        fits = self.inputs % precision.row_multiple == 0 and self.outputs % TILE == 0
        if per_weight is None or self.is_convolution or KEPT_IN_NAMES in self.name or not fits:
            return 0
        scales = precision.bytes_per_row * self.outputs + precision.bytes_per_layer
        return self.inputs * self.outputs * (unquantised - per_weight) - scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of a denoiser."""

    kind: str
    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    input_numbers: int
    """Numbers of one sample that enter it; all that a recomputed block keeps."""
    norm_weights: tuple[int, ...] = ()
    """Sizes of the weights and biases of norms."""
    attention_pairs: int = 0
    """Queries times keys times width of one sample, of all its attentions."""
    is_recomputed: bool = True
    """Whether gradient checkpointing runs it again."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of all weights."""
        norms = tuple((size,) for size in self.norm_weights)
        return tuple(shape for layer in self.layers for shape in layer.shapes) + norms

    @property
    def num_weights(self) -> int:
        """Weights of layers and norms."""
        return sum(map(prod, self.shapes))

    @property
    def linear_flops(self) -> int:
        """Multiplications and additions of its layers in a forward pass of one sample."""
        return sum(layer.flops for layer in self.layers)

    @property
    def attention_flops(self) -> int:
        """The same of its attentions: scores, and sums of values."""
        return 4 * self.attention_pairs


@dataclass(frozen=True, slots=True)
class Layout:
    """A denoiser: its blocks in the order of the forward pass, and the layers outside them."""

    blocks: tuple[Block, ...]
    outside: tuple[Layer, ...]
    """What embeds inputs, timestep and text, and makes the output; their activations are not counted."""

    @property
    def shapes(self) -> Counter[Shape]:
        """Shape -> number of weights of it."""
        outside = Counter(shape for layer in self.outside for shape in layer.shapes)
        return outside + Counter(shape for block in self.blocks for shape in block.shapes)

    @property
    def num_weights(self) -> int:
        """Numbers in the whole denoiser."""
        return sum(prod(shape) * count for shape, count in self.shapes.items())

    def weight_bytes(self, precision: Precision, *, unquantised: int) -> int:
        """Bytes of the weights.

        Args:
            precision: Format of the linear layers in the blocks.
            unquantised: Bytes of a weight in all other layers.
        """
        layers = [layer for block in self.blocks for layer in block.layers]
        saved = sum(layer.bytes_saved_by(precision, unquantised=unquantised) for layer in layers)
        return self.num_weights * unquantised - round(saved)


class FamilyMemory(Protocol):
    """A family's module `memory`."""

    PUBLISHED: Mapping[str, Mapping[str, Any]]
    """Flavour -> configuration of its denoiser."""
    TEXT_TOKENS: Mapping[str, int]
    """Flavour -> tokens of a prompt."""
    TEXT_ENCODERS: Mapping[str, tuple[TextEncoder, ...]]
    """Flavour -> its text encoders, in their order."""
    PUBLISHED_BYTES: int
    """Bytes of a weight in the files that are published without a variant."""
    LATENT_CHANNELS: int
    """Channels of latents, of 8 x 8 pixels."""
    BLOCK_PATHS: tuple[str, ...]
    """Paths in the denoiser of one block of each kind that adapters target."""
    TEXT_WIDTH_KEY: str
    """Key of the denoiser's configuration with the width of cached prompt embeds."""
    TEXT_BYTES: int
    """Bytes of a number of those in a run in 16 bits."""

    def layout(self, config: Mapping[str, Any], *, size: Size, text_tokens: int) -> Layout:
        """A denoiser of this configuration on images of a size in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """An adapter of two factors on layers of a denoiser."""

    rank: int
    """Of a T-LoRA the active rank: its forward and backward see no other."""
    is_tlora: bool
    adapts: Callable[[Layer], bool]
    merges: bool = False
    """It adds to the weight in each forward pass, as LyCORIS does without bypass_mode."""

    def shapes_on(self, layer: Layer) -> tuple[Shape, ...]:
        """Shapes of the parameters that a layer's adapter trains."""
        factors: tuple[Shape, ...] = (
            (self.rank, layer.inputs, *layer.kernel_shape),
            (layer.outputs, self.rank, *((1, 1) if layer.is_convolution and not self.is_tlora else ())),
        )
        return (*factors, (self.rank,)) if self.is_tlora else factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What decides over the activations of a step."""

    arithmetic: Arithmetic
    batch_size: int
    adapter: LowRank | None
    """None trains the whole model."""
    checkpointing_interval: int = 0
    """Every which block is recomputed, from the first on; 0 for none."""


def block_bytes(block: Block, step: Step) -> int:
    """Bytes that a block keeps for its backward pass, recomputed or not."""
    arithmetic, adapter = step.arithmetic, step.adapter
    trained = [layer for layer in block.layers if adapter is None or adapter.adapts(layer)]
    is_modulated = any(layer.source.startswith("silu") for layer in trained) or adapter is None
    per_number = bytes_of_roles(arithmetic, is_whole=adapter is None, is_modulated=is_modulated)
    numbers = sum(kept.numbers * per_number[kept.role] for kept in block.kept)
    if adapter is None:
        return step.batch_size * (numbers + arithmetic.compute_bytes * _input_numbers(trained, step))
    # PEFT casts each input to float32, so that autocast makes a copy for each layer.
    shares = adapter.is_tlora or adapter.merges or not arithmetic.is_mixed
    inputs = _input_numbers(trained, step) if shares else sum(each.inputs * each.rows for each in trained)
    hidden = 0 if adapter.merges else sum(layer.rows for layer in trained) * adapter.rank
    hidden *= 2 if adapter.is_tlora else 1
    factors = sum(_factor_bytes(layer, adapter, arithmetic) for layer in trained)
    return step.batch_size * (numbers + arithmetic.compute_bytes * (inputs + hidden)) + factors


def _input_numbers(layers: Sequence[Layer], step: Step) -> int:
    """Numbers of the inputs of layers: each once, but a norm's output once for each layer that casts it."""
    distinct: dict[str, int] = {}
    for layer in layers:
        # Where norms cast, attention returns float32, which each layer casts again.
        is_view = layer.source.startswith("part") and step.batch_size == 1 and not step.arithmetic.norms_cast
        if layer.source and not is_view:
            is_cast = layer.source.startswith("norm") and step.arithmetic.norms_cast
            distinct[layer.name if is_cast else layer.source] = layer.inputs * layer.rows
    return sum(distinct.values())


def _factor_bytes(layer: Layer, adapter: LowRank, arithmetic: Arithmetic) -> int:
    """Bytes of the factors that are made in a forward pass and kept."""
    inputs, outputs = layer.inputs * layer.kernel, layer.outputs
    first = 0 if layer.reads_text else inputs  # the first factor is for the gradient of the input
    if adapter.merges:  # so is the merged weight
        factors = MIXED * (inputs + outputs) if arithmetic.is_mixed else FLOAT32 * outputs
        return first * outputs * arithmetic.compute_bytes + adapter.rank * factors
    if adapter.is_tlora:  # A and B of twice the rank, and Q for the gradient of lambda
        return adapter.rank * arithmetic.compute_bytes * (2 * first + inputs + 2 * outputs)
    return adapter.rank * MIXED * (first + outputs) if arithmetic.is_mixed else 0


def kept_bytes(layout: Layout, step: Step) -> int:
    """Bytes that the whole denoiser keeps between forward and backward."""
    total = 0
    for block, is_recomputed in with_recomputing(layout, step):
        total += _entering_bytes(block, step) if is_recomputed else block_bytes(block, step)
    return total


def recomputed_bytes(layout: Layout, step: Step) -> int:
    """Further bytes of the largest block that is run again; 0 if none is."""
    again = [block for block, is_recomputed in with_recomputing(layout, step) if is_recomputed]
    return max((block_bytes(block, step) - _entering_bytes(block, step) for block in again), default=0)


def working_bytes(layout: Layout, step: Step) -> int:
    """Upper bound of the gradients of activations that exist at once.

    Three of the widest tensor of the largest block, and those of the block's input and output, in the format
    of norms: a bound that measured blocks keep.
    """
    return max(_working_bytes(block, step) for block in layout.blocks)


def _working_bytes(block: Block, step: Step) -> int:
    widest = max(layer.rows * max(layer.inputs, layer.outputs) for layer in block.layers)
    return step.batch_size * step.arithmetic.norm_bytes * (3 * widest + 2 * block.input_numbers)


def _entering_bytes(block: Block, step: Step) -> int:
    return step.batch_size * block.input_numbers * step.arithmetic.compute_bytes


def with_recomputing(layout: Layout, step: Step) -> list[tuple[Block, bool]]:
    """Each block, and whether it is recomputed."""
    index, pairs = 0, []
    for block in layout.blocks:
        is_recomputed = False
        if block.is_recomputed and step.checkpointing_interval:
            is_recomputed = index % step.checkpointing_interval == 0
            index += 1
        pairs.append((block, is_recomputed))
    return pairs


def attention_kept(*, tokens: int, width: int, heads: int, own_values: bool = True) -> tuple[Kept, ...]:
    """Queries, keys, values, output and logarithms of sums of a fused attention.

    Args:
        tokens: Tokens of queries, keys and values.
        width: Of all heads together.
        heads: Number of heads.
        own_values: False if the values are part of a tensor that is counted already.
    """
    names = ("query", "key", "value", "output") if own_values else ("query", "key", "output")
    kept = tuple(Kept(f"attention {name}", tokens * width) for name in names)
    return (*kept, Kept("attention sums", tokens * heads, "float32"))

"""SDXL's blocks for the memory model: the layers of `UNet2DConditionModel`. Imports no torch.

Shapes: P positions of a feature map, C channels, D width of a transformer block, L text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.models.component_memory import CLIP_L, TextEncoder
from simpletuner.helpers.models.memory_model import Block, Kept, Layer, Layout, attention_kept
from simpletuner.helpers.models.sdxl.spec import SPEC

LATENT_EDGE_PX = 8
_BASE: Mapping[str, Any] = {
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "norm_num_groups": 32,
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = dict.fromkeys(SPEC.flavours, _BASE)
"""Flavour -> configuration of its UNet."""
TEXT_TOKENS = dict.fromkeys(SPEC.flavours, 77)
_CLIP_BIGG = TextEncoder(
    num_weights=694_659_840,
    kept_weights=63_340_800 + 1280 * 1280,  # with its projection
    layers=32,
    width=1280,
    hidden=5120,
    heads=20,
    tokens=77,
)
TEXT_ENCODERS = dict.fromkeys(SPEC.flavours, (CLIP_L, _CLIP_BIGG))
PUBLISHED_BYTES = 4
LATENT_CHANNELS = 4
BLOCK_PATHS = tuple(
    f"{stage}.attentions.0.transformer_blocks.0" for stage in ("down_blocks.1", "mid_block", "up_blocks.0")
)
TEXT_WIDTH_KEY, TEXT_BYTES = "cross_attention_dim", 4


def layout(config: Mapping[str, Any], *, size: Size, text_tokens: int) -> Layout:
    """The UNet on images of a size.

    Args:
        config: Of the UNet.
        size: Of the image, in pixels.
        text_tokens: Tokens of the text encoders.
    """
    blocks = tuple(_blocks(config, size, text_tokens))
    channels, first = config["in_channels"], config["block_out_channels"][0]
    time = 4 * first
    linear = [
        (first, time),
        (config["projection_class_embeddings_input_dim"], time),
        (time, time),
        (time, time),
    ]
    outside = [Layer("", inputs, outputs, 1) for inputs, outputs in linear]
    return Layout(
        blocks,
        (*outside, _convolution("conv_in", channels, first, positions=1)),
    )


def _blocks(config: Mapping[str, Any], size: Size, text: int) -> Iterator[Block]:
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    height, width = size.height // LATENT_EDGE_PX, size.width // LATENT_EDGE_PX
    last, time, context = len(widths) - 1, 4 * widths[0], config["cross_attention_dim"]
    depth, heads = (
        _of_levels(config[key], len(widths)) for key in ("transformer_layers_per_block", "attention_head_dim")
    )

    def stage(inputs: int, level: int, *, attends: bool) -> Iterator[Block]:
        """A residual block and, in some stages, a transformer."""
        positions, outputs = (height >> level) * (width >> level), widths[level]
        yield resnet_block(inputs, outputs, positions=positions, time=time, groups=groups)
        if attends:
            block = transformer_block(
                tokens=positions, text=text, width=outputs, heads=heads[level], context=context
            )
            yield transformer_ends(outputs, positions=positions, groups=groups)
            yield from (block,) * depth[level]

    skips, channels = [widths[0]], widths[0]
    for level, name in enumerate(config["down_block_types"]):
        for _ in range(config["layers_per_block"]):
            yield from stage(channels, level, attends="CrossAttn" in name)
            channels = widths[level]
            skips.append(channels)
        if level < last:
            yield convolution(
                "downsample", channels, positions=(height >> level) * (width >> level), stride=2
            )
            skips.append(channels)
    yield from stage(channels, last, attends=True)
    yield from stage(channels, last, attends=False)
    for index, name in enumerate(config["up_block_types"]):
        level = last - index
        for _ in range(config["layers_per_block"] + 1):
            yield from stage(channels + skips.pop(), level, attends="CrossAttn" in name)
            channels = widths[level]
        if level > 0:
            yield convolution(
                "upsample", channels, positions=(height >> (level - 1)) * (width >> (level - 1))
            )
    yield output_block(channels, config["in_channels"], positions=height * width, groups=groups)


def _of_levels(value: int | Sequence[int], number: int) -> Sequence[int]:
    """One number for each level; a configuration may give one for all."""
    return (value,) * number if isinstance(value, int) else value


def transformer_block(*, tokens: int, text: int, width: int, heads: int, context: int) -> Block:
    """A block of a transformer in the UNet: attention to the image, to the text, feed-forward."""
    hidden = 4 * width
    layers = (
        *(Layer(f"attn1.{each}", width, width, tokens, "norm1", has_bias=False) for each in _QKV),
        Layer("attn1.to_out.0", width, width, tokens),
        Layer("attn2.to_q", width, width, tokens, "norm2", has_bias=False),
        *(Layer(f"attn2.{each}", context, width, text, has_bias=False, reads_text=True) for each in _QKV[1:]),
        Layer("attn2.to_out.0", width, width, tokens),
        Layer("ff.net.0.proj", width, 2 * hidden, tokens, "norm3"),
        Layer("ff.net.2", hidden, width, tokens, "geglu"),
    )
    kept = (
        *attention_kept(tokens=tokens, width=width, heads=heads),
        Kept("text query and output", 2 * tokens * width),
        Kept("text key and value", 2 * text * width),
        Kept("text attention sums", tokens * heads, "float32"),
        Kept("norm inputs", 3 * tokens * width, "norm"),
        Kept("norm statistics", 6 * tokens, "norm"),
        Kept("geglu input", 2 * tokens * hidden),
        Kept("geglu gate", tokens * hidden),
    )
    return Block(
        kind="transformer",
        layers=layers,
        kept=kept,
        input_numbers=tokens * width,
        norm_weights=(width,) * 6,
        attention_pairs=(tokens + text) * tokens * width,
    )


_QKV = ("to_q", "to_k", "to_v")


def transformer_ends(channels: int, *, positions: int, groups: int) -> Block:
    """What a transformer in the UNet has around its blocks: a norm and two projections."""
    layers: Sequence[Layer] = (
        Layer("proj_in", channels, channels, positions, "norm", is_target=False),
        Layer("proj_out", channels, channels, positions, "blocks", is_target=False),
    )
    kept = (
        Kept("norm input", channels * positions, "norm"),
        Kept("norm statistics", 2 * groups, "norm"),
    )
    return Block(
        kind="transformer ends",
        layers=tuple(layers),
        kept=kept,
        input_numbers=channels * positions,
        norm_weights=(channels,) * 2,
        is_recomputed=False,
    )


def resnet_block(inputs: int, outputs: int, *, positions: int, time: int, groups: int) -> Block:
    """A residual block: two norms, activations and 3x3 convolutions, and the time embedding between them."""
    has_shortcut = inputs != outputs
    shortcut = (_convolution("conv_shortcut", inputs, outputs, positions=positions, kernel=1),) * has_shortcut
    layers = (
        _convolution("conv1", inputs, outputs, positions=positions),
        Layer("time_emb_proj", time, outputs, 1, "silu", is_target=False),
        _convolution("conv2", outputs, outputs, positions=positions),
        *shortcut,
    )
    kept = (
        Kept("norm and silu", 2 * (inputs + outputs) * positions, "norm"),
        Kept("convolution inputs", (inputs + outputs) * positions),
        Kept("norm statistics", 4 * groups, "norm"),
        *(Kept("shortcut input", inputs * positions, "uncast"),) * has_shortcut,
    )
    return Block(
        kind="resnet",
        layers=layers,
        kept=kept,
        input_numbers=inputs * positions,
        norm_weights=(inputs, inputs, outputs, outputs),
    )


def convolution(kind: str, channels: int, *, positions: int, stride: int = 1) -> Block:
    """A 3x3 convolution between stages; `positions` of its input."""
    layer = _convolution("conv", channels, channels, positions=positions, stride=stride)
    return Block(
        kind=kind,
        layers=(layer,),
        kept=(Kept("convolution input", channels * positions),),
        input_numbers=channels * positions,
        is_recomputed=False,
    )


def output_block(channels: int, outputs: int, *, positions: int, groups: int) -> Block:
    """The last norm, activation and convolution."""
    layer = _convolution("conv_out", channels, outputs, positions=positions)
    kept = (
        Kept("norm and silu", 2 * channels * positions, "norm"),
        Kept("norm statistics", 2 * groups, "norm"),
        Kept("convolution input", channels * positions),
    )
    return Block(
        kind="output",
        layers=(layer,),
        kept=kept,
        input_numbers=channels * positions,
        norm_weights=(channels,) * 2,
        is_recomputed=False,
    )


def _convolution(
    name: str, inputs: int, outputs: int, *, positions: int, kernel: int = 9, stride: int = 1
) -> Layer:
    return Layer(
        name,
        inputs,
        outputs,
        positions,
        kernel=kernel,
        is_convolution=True,
        is_target=False,
        stride=stride,
    )

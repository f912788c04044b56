"""Flux.2's blocks for the memory model: the layers of `Flux2Transformer2DModel`. Imports no torch.

Shapes: N image tokens, L text tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.models.component_memory import TextEncoder
from simpletuner.helpers.models.flux2.spec import FLAVOURS, SIZES
from simpletuner.helpers.models.memory_model import Block, Kept, Layer, Layout, attention_kept
from simpletuner.helpers.models.two_stream_memory import modulated_kept, two_stream_layout

MLP_RATIO = 3
TIME_CHANNELS = 256
_BLOCKS_AND_HEADS = {"dev": (8, 48, 48), "4b": (5, 20, 24), "9b": (8, 24, 32)}
"""Size -> double blocks, single blocks, attention heads."""
_TEXT_WIDTHS = {"dev": 15360, "4b": 7680, "9b": 12288}


def _published(size: str, *, has_guidance: bool) -> dict[str, int]:
    double, single, heads = _BLOCKS_AND_HEADS[size]
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": 128,
        "joint_attention_dim": _TEXT_WIDTHS[size],
        "guidance_embeds": int(has_guidance),
    }


PUBLISHED: Mapping[str, Mapping[str, int]] = {
    name: _published(SIZES[name], has_guidance=flavour.has_guidance) for name, flavour in FLAVOURS.items()
}
"""Flavour -> configuration of its transformer."""
TEXT_TOKENS = dict.fromkeys(FLAVOURS, 512)
_ENCODERS = {
    # Mistral Small 3.2, with its part for images.
    "dev": TextEncoder(
        num_weights=24_011_361_280,
        kept_weights=1_342_177_280,
        layers=40,
        width=5120,
        hidden=32_768,
        heads=32,
        tokens=512,
        vocabulary=131_072,
    ),
    # Qwen3 4B, whose head has the weights of its embeddings, and 8B.
    "4b": TextEncoder(
        num_weights=4_022_468_096,
        kept_weights=388_956_160,
        layers=36,
        width=2560,
        hidden=9728,
        heads=32,
        tokens=512,
        vocabulary=151_936,
    ),
    "9b": TextEncoder(
        num_weights=8_190_735_360,
        kept_weights=1_244_659_712,
        layers=36,
        width=4096,
        hidden=12_288,
        heads=32,
        tokens=512,
        vocabulary=151_936,
    ),
}
TEXT_ENCODERS = {name: (_ENCODERS[size],) for name, size in SIZES.items()}
PUBLISHED_BYTES = 2
LATENT_CHANNELS = 32
BLOCK_PATHS = ("transformer_blocks.0", "single_transformer_blocks.0")
TEXT_WIDTH_KEY, TEXT_BYTES = "joint_attention_dim", 2


def layout(config: Mapping[str, int], *, size: Size, text_tokens: int) -> Layout:
    """The transformer on images of a size.

    Args:
        config: Of the transformer.
        size: Of the image, in pixels.
        text_tokens: Tokens of the text encoder.
    """
    return two_stream_layout(
        config,
        size=size,
        text_tokens=text_tokens,
        blocks=(double_block, single_block),
        outside=_outside,
    )


def double_block(*, image: int, text: int, width: int, heads: int) -> Block:
    """A block with weights of its own for each of image and text; all blocks share their modulation."""
    layers: list[Layer] = []
    kept = list(attention_kept(tokens=image + text, width=width, heads=heads))
    hidden = MLP_RATIO * width
    for suffix, tokens, attention in (
        ("", image, ("to_q", "to_k", "to_v", "to_out.0")),
        ("_context", text, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    ):
        layers += [
            _linear(f"attn.{each}", width, width, rows=tokens, source=f"norm1{suffix}")
            for each in attention[:3]
        ]
        layers += [
            _linear(f"attn.{attention[3]}", width, width, rows=tokens, source=f"part {suffix}"),
            _linear(f"ff{suffix}.linear_in", width, 2 * hidden, rows=tokens, source=f"norm2{suffix}"),
            _linear(f"ff{suffix}.linear_out", hidden, width, rows=tokens, source=f"swiglu{suffix}"),
        ]
        kept += [
            *modulated_kept(tokens=tokens, width=width, heads=heads, norms=2, suffix=suffix),
            Kept(f"swiglu input{suffix}", 2 * tokens * hidden),
            Kept(f"swiglu gate{suffix}", tokens * hidden),
            Kept(f"modulation{suffix}", 2 * width),
        ]
    return Block(
        kind="double",
        layers=tuple(layers),
        kept=tuple(kept),
        input_numbers=(image + text) * width,
        norm_weights=(width // heads,) * 4,
        attention_pairs=(image + text) ** 2 * width,
    )


def single_block(*, image: int, text: int, width: int, heads: int) -> Block:
    """A block whose first layer makes queries, keys, values and the feed-forward's input at once."""
    tokens, hidden = image + text, MLP_RATIO * width
    joint = 3 * width + 2 * hidden
    layers = (
        _linear("attn.to_qkv_mlp_proj", width, joint, rows=tokens, source="norm"),
        _linear("attn.to_out", width + hidden, width, rows=tokens, source="attention and swiglu"),
    )
    kept = (
        *attention_kept(tokens=tokens, width=width, heads=heads, own_values=False),
        *modulated_kept(tokens=tokens, width=width, heads=heads, norms=1, queries="cast"),
        Kept("joint projection", tokens * joint),
        Kept("swiglu gate", tokens * hidden),
        Kept("modulation", width),
    )
    return Block(
        kind="single",
        layers=layers,
        kept=kept,
        input_numbers=tokens * width,
        norm_weights=(width // heads,) * 2,
        attention_pairs=tokens**2 * width,
    )


def _linear(name: str, inputs: int, outputs: int, *, rows: int, source: str) -> Layer:
    return Layer(name, inputs, outputs, rows, source, has_bias=False)


def _outside(config: Mapping[str, int], width: int) -> tuple[Layer, ...]:
    channels = config["in_channels"]
    num_time = 2 if config["guidance_embeds"] else 1
    embeddings = [(TIME_CHANNELS, width), (width, width)] * num_time
    modulations = [(width, 6 * width), (width, 6 * width), (width, 3 * width)]
    ends = [
        *((config["joint_attention_dim"], width), (channels, width), (width, 2 * width), (width, channels))
    ]
    return tuple(
        _linear("", inputs, outputs, rows=1, source="") for inputs, outputs in embeddings + modulations + ends
    )

"""Flux.1's blocks for the memory model: the layers of `FluxTransformer2DModel`. Imports no torch.

Shapes: N image tokens, L text tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.models.component_memory import CLIP_L, TextEncoder
from simpletuner.helpers.models.flux.spec import FLAVOURS
from simpletuner.helpers.models.memory_model import Block, Kept, Layer, Layout, attention_kept
from simpletuner.helpers.models.two_stream_memory import modulated_kept, two_stream_layout

MLP_RATIO = 4
TIME_CHANNELS = 256
PUBLISHED: Mapping[str, Mapping[str, int]] = {
    name: {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": int(flavour.has_guidance),
    }
    for name, flavour in FLAVOURS.items()
}
"""Flavour -> configuration of its transformer."""
TEXT_TOKENS = {name: flavour.text_tokens for name, flavour in FLAVOURS.items()}
TEXT_ENCODERS = {
    name: (
        CLIP_L,
        # T5-XXL; the output of its feed-forward layers stays in 16 bits, beside its embeddings.
        TextEncoder(
            num_weights=4_762_310_656,
            kept_weights=1_138_229_248,
            layers=24,
            width=4096,
            hidden=10_240,
            heads=64,
            tokens=tokens,
        ),
    )
    for name, tokens in TEXT_TOKENS.items()
}
PUBLISHED_BYTES = 2
LATENT_CHANNELS = 16
BLOCK_PATHS = ("transformer_blocks.0", "single_transformer_blocks.0")
TEXT_WIDTH_KEY, TEXT_BYTES = "joint_attention_dim", 2


def layout(config: Mapping[str, int], *, size: Size, text_tokens: int) -> Layout:
    """The transformer on images of a size.

    Args:
        config: Of the transformer.
        size: Of the image, in pixels.
        text_tokens: Tokens of T5.
    """
    return two_stream_layout(
        config,
        size=size,
        text_tokens=text_tokens,
        blocks=(double_block, single_block),
        outside=_outside,
    )


def double_block(*, image: int, text: int, width: int, heads: int) -> Block:
    """A block with weights of its own for each of image and text."""
    layers: list[Layer] = []
    kept = list(attention_kept(tokens=image + text, width=width, heads=heads))
    for suffix, feed_forward, tokens, attention in (
        ("", "ff", image, ("to_q", "to_k", "to_v", "to_out.0")),
        ("_context", "ff_context", text, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    ):
        norm = f"norm1{suffix}"
        layers.append(Layer(f"{norm}.linear", width, 6 * width, 1, f"silu {norm}", is_target=False))
        layers += [Layer(f"attn.{each}", width, width, tokens, norm) for each in attention[:3]]
        layers.append(Layer(f"attn.{attention[3]}", width, width, tokens, f"part {suffix}"))
        hidden = MLP_RATIO * width
        layers += [
            Layer(f"{feed_forward}.net.0.proj", width, hidden, tokens, f"norm2{suffix}"),
            Layer(f"{feed_forward}.net.2", hidden, width, tokens, f"gelu{suffix}"),
        ]
        kept += [
            *modulated_kept(tokens=tokens, width=width, heads=heads, norms=2, suffix=suffix),
            Kept(f"gelu input{suffix}", tokens * hidden),
            Kept(f"modulation{suffix}", 8 * width),
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
    """A block that treats image and text as one sequence, attention beside feed-forward."""
    tokens, hidden = image + text, MLP_RATIO * width
    layers = (
        Layer("norm.linear", width, 3 * width, 1, "silu", is_target=False),
        Layer("proj_mlp", width, hidden, tokens, "norm"),
        *(Layer(f"attn.{each}", width, width, tokens, "norm") for each in ("to_q", "to_k", "to_v")),
        Layer("proj_out", width + hidden, width, tokens, "attention and gelu"),
    )
    kept = (
        *attention_kept(tokens=tokens, width=width, heads=heads),
        *modulated_kept(tokens=tokens, width=width, heads=heads, norms=1),
        Kept("gelu input", tokens * hidden),
        Kept("modulation", 4 * width),
    )
    return Block(
        kind="single",
        layers=layers,
        kept=kept,
        input_numbers=tokens * width,
        norm_weights=(width // heads,) * 2,
        attention_pairs=tokens**2 * width,
    )


def _outside(config: Mapping[str, int], width: int) -> tuple[Layer, ...]:
    channels = config["in_channels"]
    num_time = 2 if config["guidance_embeds"] else 1
    embeddings = [(TIME_CHANNELS, width), (width, width)] * num_time
    linear = [
        *embeddings,
        *((config["pooled_projection_dim"], width), (width, width)),
        *((config["joint_attention_dim"], width), (channels, width), (width, 2 * width), (width, channels)),
    ]
    return tuple(Layer("", inputs, outputs, 1) for inputs, outputs in linear)

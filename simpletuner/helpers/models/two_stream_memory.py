"""What transformers of double blocks, then single ones, have in common for the memory model.

A double block has weights of its own for each of image and text, a single one takes both as one sequence.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.models.memory_model import Block, Kept, Layer, Layout, Role

PIXELS_PER_TOKEN = 16 * 16


def two_stream_layout(
    config: Mapping[str, int],
    *,
    size: Size,
    text_tokens: int,
    blocks: tuple[Callable[..., Block], Callable[..., Block]],
    outside: Callable[[Mapping[str, int], int], tuple[Layer, ...]],
) -> Layout:
    """The transformer on images of a size.

    Args:
        config: Of the transformer.
        size: Of the image, in pixels.
        text_tokens: Tokens of the text encoder.
        blocks: Make a double and a single block of tokens of image and text, width and heads.
        outside: Makes the layers outside the blocks, of the configuration and the width.
    """
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    image = size.height * size.width // PIXELS_PER_TOKEN
    double, single = (make(image=image, text=text_tokens, width=width, heads=heads) for make in blocks)
    order = (double,) * config["num_layers"] + (single,) * config["num_single_layers"]
    return Layout(order, outside(config, width))


def modulated_kept(
    *, tokens: int, width: int, heads: int, norms: int, suffix: str = "", queries: Role = "float32"
) -> tuple[Kept, ...]:
    """What is kept of modulated norms, each with a gate, and of the norms of queries and keys.

    Args:
        tokens: That pass through them.
        width: Of all heads together.
        heads: Number of heads.
        norms: Number of modulated norms.
        suffix: Of the names.
        queries: Format of queries and keys before their norms.
    """
    return (
        Kept(f"norm inputs{suffix}", norms * tokens * width, "norm"),
        Kept(f"norm statistics{suffix}", 2 * norms * tokens, "norm"),
        Kept(f"query and key before norm{suffix}", 2 * tokens * width, queries),
        Kept(f"query and key statistics{suffix}", 2 * tokens * heads, "float32"),
        Kept(f"query and key normalised{suffix}", 2 * tokens * width, "normalised"),
        Kept(f"norm outputs{suffix}", norms * tokens * width, "modulated norm"),
        Kept(f"gated outputs{suffix}", norms * tokens * width, "modulated"),
    )

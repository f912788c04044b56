"""Names in the original checkpoint for denoisers built of equal blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from simpletuner.helpers.contracts import FusedSlice

Names = Mapping[str, str | FusedSlice]


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Maps paths of a denoiser's layers in diffusers to their names in the original checkpoint."""

    model: str
    """Display name of the denoiser, for messages."""
    blocks: Mapping[str, tuple[str, Names]]
    """Block list in diffusers -> block list in the original, and the names within a block."""
    outside: Names
    """Layers outside blocks."""

    def original(self, path: str) -> str | FusedSlice:
        """Original name of the layer at a diffusers path, with its rows if the original joins several layers.

        Raises:
            ValueError: The model has no such layer.
        """
        if path in self.outside:
            return self.outside[path]
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", path)
        block, names = self.blocks.get(match[1], ("", {})) if match else ("", {})
        if not match or match[3] not in names:
            raise ValueError(f"{path} is not a layer of {self.model}")
        within = names[match[3]]
        if isinstance(within, str):
            return f"{block}.{match[2]}.{within}"
        return replace(within, name=f"{block}.{match[2]}.{within.name}")


def joined(name: str, *layers: str, shares: tuple[int, ...] | None = None) -> Names:
    """Layers that the original joins to one, first rows first.

    Args:
        name: Name of the joined layer.
        layers: Paths of the layers.
        shares: Height of each layer in equal pieces of the joined one; 1 by default.
    """
    shares = shares or (1,) * len(layers)
    starts = [sum(shares[:index]) for index in range(len(layers))]
    return {
        layer: FusedSlice(name, tuple(range(start, start + share)), sum(shares))
        for layer, start, share in zip(layers, starts, shares, strict=True)
    }


def swap_scale_shift(name: str) -> FusedSlice:
    """A layer of scale and shift; the original has the shift first."""
    return FusedSlice(name, (1, 0), 2)


JOINT_ATTENTION: Names = {
    **joined("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **joined("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
"""Attention of the double blocks of Flux.1 and Flux.2."""


SINGLE_NORMS: Names = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
"""Normalisation in the single blocks of Flux.1 and Flux.2."""


def flux_names(model: str, *, embedder: str, double: Names, single: Names, outside: Names) -> BlockNames:
    """Names of a transformer of Flux.1 or Flux.2.

    Args:
        model: Display name, for messages.
        embedder: Path of the timestep and guidance embedders in diffusers.
        double: Layers of a double block besides its attention.
        single: Layers of a single block.
        outside: Layers outside blocks that only this model has.
    """
    embedders = {
        f"{embedder}.{name}_embedder.linear_{index}": f"{original}.{layer}"
        for name, original in (("timestep", "time_in"), ("guidance", "guidance_in"))
        for index, layer in ((1, "in_layer"), (2, "out_layer"))
    }
    return BlockNames(
        model=model,
        blocks={
            "transformer_blocks": ("double_blocks", {**JOINT_ATTENTION, **double}),
            "single_transformer_blocks": ("single_blocks", {**SINGLE_NORMS, **single}),
        },
        outside={
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            **embedders,
            **outside,
            "norm_out.linear": swap_scale_shift("final_layer.adaLN_modulation.1"),
            "proj_out": "final_layer.linear",
        },
    )

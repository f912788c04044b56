"""Names in the original checkpoint for denoisers that are a row of alike blocks with a few layers around."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from simpletuner.helpers.contracts import FusedSlice

Names = Mapping[str, str | FusedSlice]


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Tables from the paths of a denoiser's layers in diffusers to their names in the original checkpoint."""

    model: str
    """Of what, for messages."""
    blocks: Mapping[str, tuple[str, Names]]
    """List of blocks in diffusers -> the original's list, and the names within a block."""
    outside: Names
    """The layers outside blocks."""

    def original(self, path: str) -> str | FusedSlice:
        """The original name of the layer at a diffusers path, with its rows where it is a part of a layer.

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
        name: Of the joined layer.
        layers: Their paths.
        shares: How tall they are, in the original's smallest piece; equal if not given.
    """
    shares = shares or (1,) * len(layers)
    starts = [sum(shares[:index]) for index in range(len(layers))]
    return {
        layer: FusedSlice(name, tuple(range(start, start + share)), sum(shares))
        for layer, start, share in zip(layers, starts, shares, strict=True)
    }


def swap_scale_shift(name: str) -> FusedSlice:
    """A layer of scale and shift, whose original gives the shift first."""
    return FusedSlice(name, (1, 0), 2)

"""Cached masks of the loss, beside the latents of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simpletuner.helpers.caching.memory import EntryStore

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR = "mask"


def mask_entries(masks: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The cache entry of each mask."""
    return [{_TENSOR: mask} for mask in masks]


def read_cached_mask(store: EntryStore, key: str) -> Tensor | None:
    """The cached mask, on the CPU; None if there is none."""
    entry = store.get(key)
    return None if entry is None else entry.get(_TENSOR)

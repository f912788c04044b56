"""What a store of tensors holds."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.helpers.caching.shards import halves
from simpletuner.helpers.caching.store import TensorStore


def held(store: TensorStore, keys: Sequence[str]) -> set[str]:
    """Those of these keys that have an entry."""
    return {key for key, is_held in zip(keys, store.holds(halves(keys)), strict=True) if is_held}

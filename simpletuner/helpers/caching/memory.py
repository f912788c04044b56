"""The entries of a cache that is turned off: in memory, while a batch needs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from simpletuner.helpers.caching.shards import halves
from simpletuner.helpers.caching.store import TensorStore, whole_keys

if TYPE_CHECKING:
    from torch import Tensor


class MemoryStore:
    """Entries that are never written. `drop` removes those that were put since the last `flush`.

    An entry counts as held only after `flush`: the thread that looks ahead must not count on one that goes
    with its batch.

    Args:
        folder: Tells the stores of a run apart; nothing is read or written there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._passing: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, on the CPU; None if there is no entry."""
        return self._passing.get(key) or self._kept.get(key)

    def __contains__(self, key: object) -> bool:
        """Whether there is an entry that stays for the whole run."""
        return key in self._kept

    def holds(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Whether each of these [n, 2] halves of keys has an entry that stays for the whole run."""
        return np.isin(whole_keys(keys), whole_keys(halves(list(self._kept))))

    def put(self, key: str, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
        """Add an entry; nobody reads the metadata."""
        del metadata
        self._passing[key] = {name: each.detach().cpu() for name, each in tensors.items()}

    def flush(self) -> None:
        """Keep for the whole run the entries that are there."""
        self._kept |= self._passing
        self._passing = {}

    def drop(self) -> None:
        """Remove the entries that were put since the last `flush`."""
        self._passing = {}


EntryStore: TypeAlias = TensorStore | MemoryStore

"""Encodes what batches need and the caches lack, while the run trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from simpletuner.helpers.caching.filling import CacheRequest, put_encoded
from simpletuner.helpers.caching.memory import MemoryStore
from simpletuner.helpers.caching.prefetch import LoaderWatch

Encode: TypeAlias = Callable[[list[Any]], Sequence[Mapping[str, Tensor]]]
"""Inputs -> the tensors of their entries."""
Loaded: TypeAlias = tuple[CacheRequest[Any], Any]
"""A missing entry, and the input that it is encoded from."""


@dataclass(eq=False)
class OnDemand:
    """The encoders that stay beside the model, and which entries are known to be there.

    Inputs are loaded in the loader's thread and encoded in the thread that trains.
    """

    encoders: Mapping[str, tuple[Encode, int]]
    """Name of an encoder, as in requests -> its function, and the inputs that it takes at a time."""
    _: KW_ONLY
    watch: LoaderWatch
    _present: set[tuple[int, str]] = field(init=False, default_factory=set)
    """Entries that were read or made and stay; several stores, even of one folder, may hold one key."""

    def load(self, requests: Iterable[CacheRequest[Any]]) -> list[Loaded] | None:
        """The inputs of the entries that are missing or damaged; None if an input is unusable.

        Raises:
            DataError: An input changed or vanished.
        """
        loaded: list[Loaded] = []
        for request in requests:
            if request.encoder not in self.encoders or _entry(request) in self._present:
                continue
            self.watch.note(request.name)
            if request.key in request.store:
                self._present.add(_entry(request))
                continue
            value = request.load()
            if value is None:
                return None
            loaded.append((request, value))
        return loaded

    @contextmanager
    def encoded(self, loaded: Sequence[Loaded]) -> Iterator[None]:
        """Encode and cache these entries, unless they are there by now; a cache that is off drops its own.

        Raises:
            DataError: An encoded value is not finite.
            StorageError: An entry cannot be written.
        """
        try:
            self._encode(loaded)
            yield
        finally:
            for request, _ in loaded:
                if isinstance(request.store, MemoryStore):
                    request.store.drop()

    def _encode(self, loaded: Sequence[Loaded]) -> None:
        groups: dict[tuple[str, str], dict[tuple[int, str], Loaded]] = {}
        for request, value in loaded:
            if _entry(request) not in self._present:
                group = groups.setdefault((request.encoder, request.batch_group), {})
                group[_entry(request)] = (request, value)
        for (name, _), group in groups.items():
            encode, size = self.encoders[name]
            for batch in _batched(list(group.values()), size):
                put_encoded([request for request, _ in batch], encode([value for _, value in batch]))
                self._present.update(
                    _entry(request) for request, _ in batch if not isinstance(request.store, MemoryStore)
                )


def _entry(request: CacheRequest[Any]) -> tuple[int, str]:
    return id(request.store), request.key


def _batched(items: Sequence[Loaded], size: int) -> Iterable[Sequence[Loaded]]:
    return (items[start : start + size] for start in range(0, len(items), size))

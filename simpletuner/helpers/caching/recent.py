"""What was read recently, kept in memory up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

GIB = 1 << 30

Value = TypeVar("Value")


class RecentlyRead(Generic[Value]):
    """Values by key; the least recently used ones make room for new ones. Several threads may use it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._values: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str) -> Value | None:
        """The value of a key, now the most recently used; None if it is not kept."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def keep(self, key: str, value: Value, *, num_bytes: int) -> None:
        """Keep a value that takes this much memory; one above the limit is not kept."""
        with self._lock:
            if key in self._values or num_bytes > self._max_bytes:
                return
            self._values[key] = value, num_bytes
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes:
                _, (_, freed) = self._values.popitem(last=False)
                self._num_bytes -= freed

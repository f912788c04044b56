"""Columns of many values: texts in one piece of memory, and sequences whose items are made when asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

Rows = npt.NDArray[np.int64]
"""Positions in a column."""
# File names hold surrogates for bytes that are not UTF-8.
_CODING = ("utf-8", "surrogatepass")
_PIECE = 1 << 16


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are made each time they are asked for; equal to sequences of equal items."""

    def __init__(self, length: int, make: Callable[[int], T]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(map(self._make, range(*index.indices(self._length))))
        return self._make(range(self._length)[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._make, range(self._length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def joined(parts: Sequence[Sequence[T]]) -> Lazy[T]:
    """The items of several sequences as one."""
    ends = list(accumulate(map(len, parts)))

    def item(index: int) -> T:
        number = bisect_right(ends, index)
        return parts[number][index - (ends[number] - len(parts[number]))]

    return Lazy(ends[-1] if ends else 0, item)


class Texts(Sequence[str]):
    """Texts in one piece of memory; none holds a NUL.

    Args:
        data: The texts as UTF-8, each with a NUL after it.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data
        ends = np.flatnonzero(data == 0)
        self._ends = ends.astype(np.uint32) if len(data) < 1 << 32 else ends
        if len(data) and data[-1] != 0:
            raise ValueError("its last text has no end")

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """These texts.

        Raises:
            ValueError: One of them holds a NUL.
        """
        listed = list(texts)
        made = cls(np.frombuffer("\0".join([*listed, ""]).encode(*_CODING), dtype=np.uint8))
        if len(made) != len(listed):
            raise ValueError("a text holds a NUL")
        return made

    def take(self, rows: Rows) -> Texts:
        """The texts at some positions."""
        if is_everything(rows, len(self)):
            return self
        return Texts.of([self[row] for row in rows.tolist()])

    def is_same(self, other: Texts) -> bool:
        """Whether both hold the same texts."""
        return len(self.data) == len(other.data) and bool((self.data == other.data).all())

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._between(index, index)

    def __iter__(self) -> Iterator[str]:
        # In pieces, so that a million texts are never a million objects at once.
        pieces = range(0, len(self), _PIECE)
        return chain.from_iterable(map(self._piece, pieces))

    def _piece(self, first: int) -> list[str]:
        return self._between(first, min(first + _PIECE, len(self)) - 1).split("\0")

    def _between(self, first: int, last: int) -> str:
        """The texts from one position to another, with a NUL between them."""
        start = int(self._ends[first - 1]) + 1 if first else 0
        return self.data[start : int(self._ends[last])].tobytes().decode(*_CODING)


def is_everything(rows: Rows, length: int) -> bool:
    """Whether these positions are all of a column of this length, in its order."""
    return len(rows) == length and bool((rows == np.arange(length)).all())


def in_pieces(values: npt.NDArray[Any]) -> Iterator[Any]:
    """The rows of an array as Python's values, of which few are in memory at a time."""
    pieces = range(0, len(values), _PIECE)
    return chain.from_iterable(values[first : first + _PIECE].tolist() for first in pieces)


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)

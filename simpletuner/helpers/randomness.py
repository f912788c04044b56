"""Randomness without state: every stream is derived from (seed, purpose, index)."""

from __future__ import annotations

import xxhash


def mix(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit seed that depends on all arguments and on nothing else.

    The same arguments give the same value on every machine and in every process, so what is drawn
    for a sample depends neither on the number of processes nor on where a run was interrupted.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, indices)])
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1

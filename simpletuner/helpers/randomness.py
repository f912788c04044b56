"""Randomness without state: every random stream derives from (seed, purpose, index)."""

from __future__ import annotations

import xxhash


def mix(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit seed that depends on the arguments alone, on every machine and in every process.

    Random values of a sample therefore depend neither on the number of processes nor on interruptions.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, indices)])
    # Names of files need not be UTF-8.
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape")) >> 1

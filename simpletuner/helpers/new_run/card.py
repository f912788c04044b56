"""The graphics card of this machine, asked of its driver without torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

_QUERY = ("nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits")
_LONGEST_S = 10
_MIB_PER_GB = 1024


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card."""

    name: str
    memory: float
    """GB of 2^30 bytes, to a tenth, as its driver reports them."""


def find_card() -> Card | None:
    """The card that a run uses, the first; None where nvidia-smi finds none or is not installed."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_LONGEST_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return read_card(done.stdout)


def read_card(listing: str) -> Card | None:
    """The first card of nvidia-smi's listing, a line "MIB, NAME" each; None if it has none."""
    mib, _, name = listing.partition("\n")[0].partition(",")
    if not mib.strip().isdecimal():
        return None
    return Card(name.strip(), round(int(mib) / _MIB_PER_GB, 1))

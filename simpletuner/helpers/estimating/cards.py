"""Named cards, and the time that a run takes on one. Imports no torch.

The time is that of the arithmetic at a stated share of the peak, without loading, caches and checkpoints.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.errors import ConfigError

EFFICIENCY = 0.4
"""Share of a card's dense bf16 peak that a step is taken to reach; an assumption, not measured here."""
HOST_BYTES_PER_S = 20e9
"""Copies between host and device, over PCIe 4."""
_FILE = Path(__file__).parent / "cards.json"


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, by its vendor's figures."""

    name: str
    memory_gib: float
    bf16_tflops: float
    """Dense, with float32 sums; 10^12 flops a second."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes and copies."""

    flops_per_step: float
    """Of an optimiser step."""
    copied_per_step: float
    """Bytes between host and device."""
    validation_flops: float
    """Of all validation images."""
    num_steps: int | None

    def seconds_per_step(self, card: Card) -> float:
        """Time of an optimiser step."""
        return self.flops_per_step / _speed(card) + self.copied_per_step / HOST_BYTES_PER_S

    def seconds(self, card: Card) -> float | None:
        """Time of all steps and validation images; None if the number of steps is unknown."""
        if self.num_steps is None:
            return None
        return self.num_steps * self.seconds_per_step(card) + self.validation_flops / _speed(card)


def _speed(card: Card) -> float:
    return EFFICIENCY * card.bf16_tflops * 1e12


@cache
def cards() -> tuple[Card, ...]:
    """The known cards, in the order of the table."""
    return tuple(Card(**each) for each in json.loads(_FILE.read_bytes())["cards"])


def card_named(name: str) -> Card:
    """The card of a name as in the table, but for capitals, blanks, vendor and form.

    A name without its memory is the smallest of the cards that have it.

    Raises:
        ConfigError: No card has the name.
    """
    wanted = _plain(name)
    matching = [card for card in cards() if _plain(card.name) in (wanted, f"rtx{wanted}")]
    matching = matching or [card for card in cards() if _goes_on(_plain(card.name), wanted)]
    if not matching:
        names = [card.name for card in cards()]
        raise ConfigError(
            f"--card {name!r}: not a known card.{nearest(name, names)} Known: {', '.join(names)}. For "
            "another give its memory in GiB: --memory 24."
        )
    return matching[0]


def _goes_on(name: str, wanted: str) -> bool:
    """Whether a name is what is wanted with a memory, such as 40gb; other letters are other cards."""
    has_number = any(each.isdigit() for each in wanted)
    return has_number and re.fullmatch(rf"(rtx)?{wanted}\d\d?gb", name) is not None


def _plain(name: str) -> str:
    plain = "".join(each for each in name.lower() if each.isascii() and each.isalnum())
    plain = re.sub("pcie|sxm[45]?|hbm3e?|generation", "", plain)
    for word in ("nvidia", "geforce", "amd", "instinct"):
        plain = plain.replace(word, "")
    return plain

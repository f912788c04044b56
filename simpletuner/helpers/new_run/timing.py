"""How long a run takes on a named card, estimated."""

from __future__ import annotations

from dataclasses import replace

from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.estimating.cards import card_named
from simpletuner.helpers.estimating.estimate import Estimate


def minutes_on(card: str | None, estimate: Estimate | None, *, steps: int) -> int | None:
    """Minutes of so many steps and their validation images; None for a card or a model without figures."""
    if card is None or estimate is None or estimate.work is None:
        return None
    try:
        seconds = replace(estimate.work, num_steps=steps).seconds(card_named(card))
    except ConfigError:  # no figures
        return None
    return None if seconds is None else max(1, round(seconds / 60))

"""Values of a rank schedule as the command line takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from simpletuner.helpers.configuration.schema.lycoris import RankScale, ScheduleVariant
from simpletuner.helpers.errors import ConfigError

EXAMPLE = "min_rank=8,alpha=1.0,kind=floor"


def _min_rank(text: str) -> int | float:
    """A rank, or a share of it."""
    try:
        return int(text)
    except ValueError:
        share = float(text)
        if not 0 < share < 1:
            raise
        return share


_TYPES: dict[str, Callable[[str], int | float | str]] = {
    "min_rank": _min_rank,
    "alpha": float,
    "kind": str,
    "scale": str,
}
_CHOICES = {"kind": get_args(ScheduleVariant), "scale": get_args(RankScale)}


def schedule_options(text: str) -> dict[str, int | float | str]:
    """Read "min_rank=8,alpha=1.0,kind=floor", any of these keys once.

    Raises:
        ConfigError: A key is unknown or stands twice, or a value is invalid.
    """
    options: dict[str, int | float | str] = {}
    for entry in text.split(","):
        key, _, value = (part.strip() for part in entry.partition("="))
        if key not in _TYPES or key in options:
            problem = "stands twice" if key in options else f"is none of {', '.join(_TYPES)}"
            raise ConfigError(f"--schedule {text}: {key!r} {problem}. Write it like {EXAMPLE}.")
        try:
            options[key] = _TYPES[key](value)
        except ValueError:
            raise ConfigError(f"--schedule {text}: {key} is {value!r}. Write it like {EXAMPLE}.") from None
    for key, known in _CHOICES.items():
        if options.get(key, known[0]) not in known:
            raise ConfigError(f"--schedule {text}: {key} must be one of {', '.join(known)}.")
    return options

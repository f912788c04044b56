"""Values of a rank schedule as the command line takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from simpletuner.helpers.configuration.schema.lycoris import ScheduleVariant
from simpletuner.helpers.errors import ConfigError

EXAMPLE = "min_rank=8,alpha=1.0,kind=floor"
_TYPES: dict[str, Callable[[str], int | float | str]] = {"min_rank": int, "alpha": float, "kind": str}


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
    kinds = get_args(ScheduleVariant)
    if options.get("kind", kinds[0]) not in kinds:
        raise ConfigError(f"--schedule {text}: kind must be one of {', '.join(kinds)}.")
    return options

"""The moving average of the weights in files of programs that save it in place of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.migration.draft import Settings

OFF = "There is no EMA."


def put_ema(settings: Settings, switch: str, *, numbers: Mapping[str, str], images: str) -> bool:
    """Our EMA as the adapter file, if the file asks for one; after the optimiser is put.

    Args:
        settings: Has the keys.
        switch: The key that switches the average on.
        numbers: Key of the decay or the interval -> ours; approximate, as their table says why.
        images: Value of ema_validation.

    Returns:
        Whether the run keeps an average.
    """
    draft = settings.draft
    if not settings.flag(switch) or settings.text(switch).upper() == "OFF":
        for key in filter(settings.has, numbers):
            settings.decide(key, "no effect", text=OFF)
        return False
    if OPTIMIZERS[str(draft.config["optimizer"])].has_averages:
        text = (
            f"{draft.config['optimizer']} averages its weights by itself, and the adapter has that average."
        )
        for key in filter(settings.has, (switch, *numbers)):
            settings.decide(key, "not translated", text=text)
        return False
    draft.config.update({"use_ema": True, "ema_adapter_file": "main", "ema_validation": images})
    ours = f'use_ema: true, ema_adapter_file: "main", ema_validation: "{images}"'
    settings.decide(switch, "translated", ours=ours, text=settings.rows[switch].text)
    for key, name in numbers.items():
        settings.put(key, name, settings.value(key))
    return True

"""The section of config.json on the moving average of the trained weights."""

from __future__ import annotations

from typing import Literal

from simpletuner.helpers.configuration.schema.base import Count, Section, ShareBelowOne


class EmaConfig(Section):
    """An exponential moving average (EMA) of the adapter, in files and validation images of its own."""

    use_ema: bool = False
    """Keep a moving average of the trained weights, in float32. The other keys need it."""
    ema_decay: ShareBelowOne = 0.995
    """Share of the average that an update keeps; less in the first updates: (1 + n) / (10 + n) after n."""
    ema_update_interval: Count = 1
    """Optimiser steps between updates."""
    ema_device: Literal["cpu", "accelerator"] = "cpu"
    """Memory that holds the average: the host's, or the device's, where an update is faster."""
    ema_validation: Literal["none", "ema_only", "comparison"] = "comparison"
    """Validation images: none, of the trained weights; ema_only, of the average; comparison, of both."""
    ema_adapter_file: Literal["plain", "main"] = "plain"
    """plain: the adapter file has the trained weights, and the file with .ema in its name the average; main
    exchanges the two."""

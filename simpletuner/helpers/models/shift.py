"""Shift of the noise levels of flow matching. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig


@dataclass(frozen=True, slots=True)
class DynamicShift:
    """Shift exp(mu), where mu is linear in the number of image tokens.

    Source: Esser et al., arXiv:2403.03206, section 5.3.2; the defaults are those of diffusers' scheduler.
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    def __call__(self, num_tokens: int) -> float:
        """Shift for this number of image tokens."""
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_mu + slope * (num_tokens - self.base_tokens))


def static_shift(noise: NoiseConfig, scheduler: Mapping[str, object]) -> float | None:
    """Shift of sigma; None if it depends on the number of image tokens.

    Args:
        noise: The user's settings.
        scheduler: Configuration of the model's scheduler, for what the user leaves open.
    """
    if noise.flow_schedule_auto_shift:
        return None
    if noise.flow_schedule_shift is not None:
        return noise.flow_schedule_shift or 1.0
    if scheduler.get("use_dynamic_shifting"):
        return None
    shift = scheduler.get("shift", 1.0)
    return float(shift) if isinstance(shift, int | float) else 1.0


def dynamic_shift(scheduler: Mapping[str, object]) -> DynamicShift:
    """Shift with the parameters of a scheduler's configuration."""
    names = {
        "base_image_seq_len": "base_tokens",
        "max_image_seq_len": "max_tokens",
        "base_shift": "base_mu",
        "max_shift": "max_mu",
    }
    given = {ours: scheduler[theirs] for theirs, ours in names.items() if theirs in scheduler}
    return DynamicShift(**given)  # type: ignore[arg-type]  # diffusers wrote numbers


def shift_at(noise: NoiseConfig, scheduler: Mapping[str, object], *, num_tokens: int) -> float:
    """Shift for images of num_tokens: the user's, else the model's."""
    fixed = static_shift(noise, scheduler)
    return dynamic_shift(scheduler)(num_tokens) if fixed is None else fixed


def shift_by_tokens(scheduler: Mapping[str, object], num_tokens: int) -> float:
    """Shift of a scheduler for images of num_tokens."""
    return dynamic_shift(scheduler)(num_tokens)

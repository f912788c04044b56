"""An exponential running mean."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RunningMean:
    """Exponential running mean, corrected for its start at zero."""

    keep: float = 0.95
    """Weight of the past, in [0, 1)."""
    _total: float = 0.0
    _weight: float = 0.0

    def update(self, value: float) -> float:
        """Add a value and return the mean."""
        self._total = self.keep * self._total + (1.0 - self.keep) * value
        self._weight = self.keep * self._weight + (1.0 - self.keep)
        return self._total / self._weight

"""Counters of a run that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Progress:
    """Optimiser steps and samples of a run so far."""

    step: int = 0
    """Optimiser steps."""
    samples: int = 0
    """Of all processes."""

    def advance(self, *, samples: int) -> None:
        """Count one optimiser step with this many samples of all processes."""
        self.step += 1
        self.samples += samples

    def state_dict(self) -> dict[str, int]:
        """Counters by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the counters."""
        self.step, self.samples = state["step"], state["samples"]

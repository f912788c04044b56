"""The optimiser steps at which something is due: every few steps, and at the end of every few epochs."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache

from simpletuner.helpers.data.phases import Calendar, even


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """Where the epochs of a run end among its optimiser steps.

    An epoch that ends inside an accumulation window ends with the step of that window, which also trains on
    the first batches of the next epoch.
    """

    calendar: Calendar = field(default_factory=lambda: even(1))
    """Of the micro-batches of one process."""
    batches_per_step: int = 1
    """Micro-batches of one process in an optimiser step."""
    step: int = 0
    """The optimiser step that the run goes on from."""
    batches: int = 0
    """Micro-batches of one process up to that step; a resumed run may have had other batches before it."""

    def completed(self, step: int) -> int:
        """Number of epochs that are complete after an optimiser step."""
        batches = self.batches + (step - self.step) * self.batches_per_step
        return self.calendar.epoch_of(batches)

    def end_of(self, epochs: int) -> int:
        """The optimiser step after which this many epochs are complete."""
        return self.step - (self.batches - self.calendar.end_of(epochs)) // self.batches_per_step

    def is_due(self, step: int, *, steps: int, epochs: int) -> bool:
        """Whether something is due after an optimiser step.

        Args:
            step: From 1; nothing is due at 0.
            steps: Optimiser steps between two times; 0 for none.
            epochs: Completed epochs between two times; 0 for none.
        """
        if step <= 0:
            return False
        if steps and step % steps == 0:
            return True
        return bool(epochs) and self.completed(step) // epochs > self.completed(step - 1) // epochs


def num_due(where: Epochs, *, after: int, before: int, steps: int, epochs: int) -> int:
    """How many times something is due at the steps between two others."""
    by_steps = max(0, (before - 1) // steps - after // steps) if steps else 0
    ends = _ends_between_steps(where, steps=steps, epochs=epochs, before=before) if epochs else ()
    return by_steps + len(ends) - bisect_right(ends, after)


@lru_cache(maxsize=8)
def _ends_between_steps(where: Epochs, *, steps: int, epochs: int, before: int) -> tuple[int, ...]:
    """The steps at which only the end of an epoch is due, in their order."""
    first, last = where.completed(0) // epochs + 1, where.completed(before - 1) // epochs
    ends = dict.fromkeys(where.end_of(number * epochs) for number in range(first, last + 1))
    return tuple(end for end in ends if not steps or end % steps)

"""The optimiser steps at which something is due: every few steps, and at the end of every few epochs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """Where the epochs of a run end among its optimiser steps.

    An epoch that ends inside an accumulation window ends with the step of that window, which also trains on
    the first batches of the next epoch.
    """

    batches_per_epoch: int = 1
    """Micro-batches of one process."""
    batches_per_step: int = 1
    """Micro-batches of one process in an optimiser step."""
    step: int = 0
    """The optimiser step that the run goes on from."""
    batches: int = 0
    """Micro-batches of one process up to that step; a resumed run may have had other batches before it."""

    def completed(self, step: int) -> int:
        """Number of epochs that are complete after an optimiser step."""
        batches = self.batches + (step - self.step) * self.batches_per_step
        return batches // self.batches_per_epoch

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


@lru_cache(maxsize=8)
def due_steps(where: Epochs, *, steps: int, epochs: int, end: int) -> tuple[int, ...]:
    """The steps before `end` at which something is due, in their order."""
    return tuple(step for step in range(1, end) if where.is_due(step, steps=steps, epochs=epochs))

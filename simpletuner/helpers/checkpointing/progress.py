"""Counters of a run that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from simpletuner.helpers.errors import CheckpointError


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

    def micro_step(self, *, global_batch: int) -> int:
        """Index of the next micro-batch; `global_batch` is the samples in one, of all processes.

        Raises:
            CheckpointError: The samples so far are no whole number of such micro-batches.
        """
        micro_step, rest = divmod(self.samples, global_batch)
        if rest:
            fitting = [str(size) for size in range(1, 65) if self.samples % size == 0]
            raise CheckpointError(
                f"The checkpoint was saved after {self.samples} samples, which {global_batch} (processes x "
                f"train_batch_size) does not divide. Resume with one of: {', '.join(fitting)}."
            )
        return micro_step

"""How far a run is: the counters that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from simpletuner.helpers.errors import CheckpointError


@dataclass(slots=True)
class Progress:
    """The counters that a checkpoint keeps."""

    step: int = 0
    """Optimiser steps taken."""
    samples: int = 0
    """Seen by all processes."""

    def advance(self, *, samples: int) -> None:
        """Count one optimiser step over `samples` samples of all processes."""
        self.step += 1
        self.samples += samples

    def state_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counters over."""
        self.step, self.samples = state["step"], state["samples"]

    def micro_step(self, *, global_batch: int) -> int:
        """The micro-batch that comes next, for `global_batch` samples in one micro-batch of all processes.

        Raises:
            CheckpointError: The samples seen so far are no whole number of such micro-batches.
        """
        micro_step, rest = divmod(self.samples, global_batch)
        if rest:
            fitting = [str(size) for size in range(1, 65) if self.samples % size == 0]
            raise CheckpointError(
                f"The checkpoint has seen {self.samples} samples, which {global_batch} (processes x "
                f"train_batch_size) does not divide. Resume with one of: {', '.join(fitting)}."
            )
        return micro_step

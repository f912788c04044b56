"""The loss of held-out images and of training images, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.run_folder import EVALUATIONS_FILE
from simpletuner.helpers.reporting.html_report.series import read_log


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationMetrics:
    """One row of the log of evaluations: fixed images at fixed noise levels, each with its own fixed noise.

    The losses are those of training, in the mean over images and noise levels; None without a finite one.
    """

    step: int
    """Optimiser steps before it; 0 is the base model."""
    eval_loss: float | None
    """Of held-out images."""
    eval_train_loss: float | None
    """Of training images."""
    eval_loss_by_band: Mapping[str, float | None]
    """In each band of timesteps; None for a band without a noise level."""
    eval_train_loss_by_band: Mapping[str, float | None]
    images: int
    """Held-out images."""
    image_set: int
    """The same number for the same held-out images and captions; below 2**53, which JSON keeps."""
    train_images: int
    seconds: float

    @property
    def eval_gap(self) -> float | None:
        """How much larger the loss of held-out images is."""
        if self.eval_loss is None or self.eval_train_loss is None:
            return None
        return self.eval_loss - self.eval_train_loss

    @property
    def curves(self) -> dict[str, float]:
        """The losses and the gap by name, for trackers that draw curves."""
        values = {
            "eval_loss": self.eval_loss,
            "eval_train_loss": self.eval_train_loss,
            "eval_gap": self.eval_gap,
            **{f"eval_loss_{band}": loss for band, loss in self.eval_loss_by_band.items()},
            **{f"eval_train_loss_{band}": loss for band, loss in self.eval_train_loss_by_band.items()},
        }
        return {name: value for name, value in values.items() if value is not None}


def evaluated_steps(output_dir: Path) -> set[int]:
    """The optimiser steps after which a run was evaluated."""
    return {int(step) for step in read_log(output_dir / EVALUATIONS_FILE).steps}


def lowest_held_out(output_dir: Path) -> str | None:
    """When the loss of held-out images was lowest, in words; None for a run that evaluated none.

    The losses of other images than the last ones are not compared: a dataset may have changed.
    """
    log = read_log(output_dir / EVALUATIONS_FILE)
    losses, sets = log.column("eval_loss"), log.column("image_set")
    is_known = np.isfinite(losses)
    if not is_known.any():
        return None
    last = sets[is_known][-1]
    is_compared = is_known & ((sets == last) | (np.isnan(sets) & np.isnan(last)))  # nan: an earlier version's
    losses, steps = losses[is_compared], log.steps[is_compared]
    best = int(np.argmin(losses))
    number = counted(len(losses), "evaluation")
    if len(losses) < is_known.sum():
        number += " of the present held-out images"
    return f"lowest loss {losses[best]:.5f} at step {steps[best]:.0f} of {number}; last {losses[-1]:.5f}"

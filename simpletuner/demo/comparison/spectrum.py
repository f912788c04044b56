"""How many directions of a layer an adapter changes.

Shapes: K inner width of the two factors of a delta, I in (times the kernel of a convolution), O out features.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import read_source
from simpletuner.helpers.adapters.files.foreign.translation import with_schedule

if TYPE_CHECKING:
    from simpletuner.helpers.adapters.files.foreign.translation import ScheduleOptions


def mean_participation(file: Path, *, timestep: int, schedule: ScheduleOptions | None = None) -> float:
    """Participation ratio of the delta at a timestep, averaged over the layers of an adapter file.

    Args:
        file: A file of this program: T-LoRA or LoRA.
        timestep: Its active rank is taken; at timestep 0 every rank is active.
        schedule: Values in place of those of the file's rank schedule.
    """
    stored = adapter_file.read(file)
    source = read_source(with_schedule(stored, schedule) if schedule else stored)
    return fmean(
        participation_ratio(*layer.factors_at(source.rank_at(timestep, layer)))
        for layer in source.layers.values()
    )


def participation_ratio(a: Tensor, b: Tensor) -> float:
    """(sum s^2)^2 / sum s^4 over the singular values s of the delta `b @ a`; 0 for a zero delta.

    It is between 1 and the delta's rank, which it reaches where all singular values are equal. The s^2 are
    the eigenvalues of the [K, K] matrix b^T b a a^T, so it follows from two traces.

    Args:
        a: [K, I] or [K, I, k, k].
        b: [O, K].

    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262,
    of the eigenvalues of a covariance matrix, which the s^2 are for a delta.
    """
    a, b = a.double().flatten(1), b.double()
    squares = (b.T @ b) @ (a @ a.T)
    total = float(squares.trace())
    return total**2 / float((squares @ squares).trace()) if total else 0.0

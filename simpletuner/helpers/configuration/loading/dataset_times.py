"""Rules on the steps and epochs in which datasets take part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from simpletuner.helpers.configuration.loading.building import Source, Validated
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import TrainingConfig


def check_times(
    datasets: Sequence[DatasetConfig], training: Validated[TrainingConfig], source: Source
) -> None:
    """Check that some dataset takes part in every step and in every epoch.

    What steps and epochs say together is known only once the images are counted.
    """
    if not datasets or training.section is None:
        return
    last_step = training.section.max_train_steps
    last_epoch = None if last_step is not None else training.section.num_train_epochs
    steps = [(each.start_step, each.end_step) for each in datasets]
    epochs = [(each.start_epoch, each.end_epoch) for each in datasets]
    for unit, windows, last in (("step", steps, last_step), ("epoch", epochs, last_epoch)):
        for first, end in gaps(windows, last=last):
            text = f"no dataset takes part in {unit}{f' {first}' if first == end else f's {first} to {end}'}."
            source.add("data_backend_config", f"{text} Set start_{unit} or end_{unit} of one of them.")


def gaps(windows: Iterable[tuple[int, int | None]], *, last: int | None) -> list[tuple[int, int]]:
    """The first and last numbers of each gap between windows, from 1 on.

    Args:
        windows: First and last number of each; None for no end.
        last: The number that must be covered last; None for that of the windows.
    """
    found: list[tuple[int, int]] = []
    covered: float = 0
    for start, end in sorted(windows, key=lambda window: window[0]):
        if covered + 1 < start and (last is None or covered < last):
            found.append((int(covered) + 1, start - 1 if last is None else min(start - 1, last)))
        covered = max(covered, math.inf if end is None else end)
    if last is not None and covered < last:
        found.append((int(covered) + 1, last))
    return found

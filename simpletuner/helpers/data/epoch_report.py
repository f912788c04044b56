"""What the log says of the epochs of a run."""

from __future__ import annotations

import logging

from simpletuner.helpers.configuration.schema.sections import TrainingConfig
from simpletuner.helpers.data.phases import Curriculum, batch_sizes, stretch_lines
from simpletuner.helpers.data.sliders import slider_draws, slider_problems
from simpletuner.helpers.io.names import counted, printable

logger = logging.getLogger(__name__)

_SHOWN = 5


def report_epochs(curriculum: Curriculum, training: TrainingConfig) -> None:
    """Log the batches of the epochs, the buckets that are smaller than a batch, and sliders off balance."""
    small = curriculum.small_buckets()
    if small:
        names = [f"{printable(bucket.name)} ({bucket.num_samples})" for bucket in small]
        logger.warning(
            "%s fewer images than the batch of %d, so a batch repeats images: %s.",
            f"{counted(len(small), 'bucket has', 'buckets have')}",
            max(bucket.batch_size for bucket in small),
            ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else ""),
        )
    reached = curriculum.calendar.reached(training)
    lines = stretch_lines(curriculum.configs, curriculum.calendar, training)
    unbalanced: dict[str, None] = {}
    for number, stretch in enumerate(reached):
        buckets = curriculum.buckets(stretch.datasets)
        drawn = sum(bucket.num_batches * bucket.batch_size for _, bucket in buckets)
        repeated = drawn - sum(bucket.samples_per_epoch for _, bucket in buckets)
        filling = counted(repeated, "image is a repetition", "images are repetitions")
        logger.info(
            "%s of %s%s.",
            f"Datasets {lines[number]}" if lines else f"Epoch: {counted(stretch.length, 'batch', 'batches')}",
            batch_sizes(bucket.batch_size for _, bucket in buckets),
            f"; {filling} to fill the batches" if repeated else "",
        )
        unbalanced |= dict.fromkeys(slider_problems(slider_draws(buckets)))
    for text in unbalanced:
        logger.warning("%s", text)

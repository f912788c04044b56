"""What a run will evaluate, as `validate` prints it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.data.held_out import all_held_out, without_any
from simpletuner.helpers.data.preview import DatasetPreview
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.io.names import counted


def evaluation_rows(config: RunConfig, previews: Sequence[DatasetPreview]) -> Iterator[tuple[str, str]]:
    """The row on evaluations, and what each of them costs; none for a run without held-out images."""
    if not any(each.config.holds_out for each in previews):
        return
    section = config.evaluation
    if section.eval_loss_disable:
        yield "evaluation", "none: eval_loss_disable"
        return
    ids = section.eval_dataset_id
    counting = [each for each in previews if not ids or each.config.id in ids]
    about = "" if all(each.is_whole for each in previews) else "about "
    found = sum(each.expected_held_out for each in counting)
    if not found:
        is_known = len(previews) == len(config.datasets) and all(
            each.is_whole and each.unreachable is None for each in previews
        )
        yield "evaluation", "none: no image is held out" if is_known else "of the images that the run finds"
        return
    held_out = min(section.num_eval_images, found)
    trained = min(held_out, sum(each.expected_trained for each in previews))
    intervals = {"step": section.eval_steps_interval, "epoch": section.eval_epoch_interval}
    every = [f"every {counted(number, noun)}" for noun, number in intervals.items() if number]
    yield (
        "evaluation",
        f"{about}{held_out} of {counted(found, 'held-out image')} and {counted(trained, 'training image')}, "
        f"{', '.join(['before step 1', *every])} and at the end",
    )
    levels = section.eval_timesteps
    predictions = (held_out + trained) * levels
    sizes = [each.config.train_batch_size or config.training.train_batch_size for each in previews]
    smallest, largest = min(sizes), max(sizes)
    yield (
        "",
        f"{counted(levels, 'noise level')} of each: {about}{counted(predictions, 'prediction')} without "
        f"gradients each time, "
        f"{largest if smallest == largest else f'{smallest} to {largest}'} at once",
    )


def evaluation_problems(config: RunConfig, previews: Sequence[DatasetPreview]) -> Iterator[str]:
    """Shares that hold out nothing, and keys without effect."""
    for each in previews:
        if each.is_whole and each.config.eval_share and not each.num_held_out and each.num_trained:
            yield without_any(each.config, each.num_trained)
    section = config.evaluation
    given = sorted(key for key in section.model_fields_set if getattr(section, key))
    if given and not any(each.holds_out for each in config.datasets):
        yield (
            f"{', '.join(given)}: no effect without held-out images. Set eval_share, or add an entry with "
            "dataset_type eval."
        )


def without_training(previews: Sequence[DatasetPreview]) -> list[str]:
    """Errors of the datasets of which no image can be used, or all are held out."""
    whole = [each for each in previews if each.is_whole and each.unreachable is None and not each.num_trained]
    return [
        *(
            f"Dataset {each.config.id!r}: no image in {each.config.place} can be used "
            f"({listed(each.problems)})."
            for each in whole
            if not (each.num_held_out or each.num_copies) and each.problems
        ),
        *(
            all_held_out(each.config, each.num_held_out + each.num_copies)
            for each in whole
            if each.config.is_trained and (each.num_held_out or each.num_copies)
        ),
    ]

"""A run that has no steps left, found by its files before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from simpletuner.helpers.checkpointing.checkpoints import LATEST, find_checkpoint, remove_unfinished
from simpletuner.helpers.checkpointing.fingerprint import resume_fingerprint
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.publishing.uploads import Uploads
from simpletuner.helpers.reporting.run_summary import FinishedRun, load_summary
from simpletuner.helpers.training.packages import check_packages
from simpletuner.helpers.training.previews import preview_datasets

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import ModelSpec


def find_finished(config: RunConfig, families: Mapping[str, ModelSpec]) -> FinishedRun | None:
    """The run, if its files show that it has no steps left and that nothing is damaged.

    None leaves the decision to the start with torch, which writes damaged files again, goes back to a
    checkpoint, and has the words for what is wrong. So does a run of several processes: they must not decide
    differently.

    Raises:
        MissingDependencyError: The package of a choice is not installed.
        CheckpointError: The run has other settings than its checkpoint.
        StorageError: Another run holds the output folder.
    """
    output_dir = config.checkpoint.output_dir
    summary = load_summary(output_dir)
    if summary is None or summary.step < (config.training.max_train_steps or 0):
        return None
    if config.checkpoint.resume_from_checkpoint != LATEST or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    check_packages(config)
    try:
        previews = preview_datasets(config, families[config.model.model_family])
    except DataError:
        return None
    max_steps = previews.calendar.num_steps(config.training)
    if not previews.are_whole or summary.step < max_steps:
        return None
    with run_lock(output_dir):
        remove_unfinished(output_dir)
        if summary.damage(output_dir):
            return None
        resumed = find_checkpoint(config.checkpoint, settings=resume_fingerprint(config))
    if resumed is None or resumed.step != summary.step:
        return None
    return FinishedRun(summary, max_steps, uploads_of(config))


def uploads_of(
    config: RunConfig, *, is_main_process: bool = True, should_stop: Callable[[], bool] = bool
) -> Uploads:
    """The uploads of a run, on the main process; not yet started."""
    publishing = config.publishing
    return Uploads(
        output_dir=config.checkpoint.output_dir,
        is_enabled=publishing.push_to_hub and is_main_process,
        with_checkpoints=publishing.push_checkpoints_to_hub,
        repository=repository_name(config),
        public=not publishing.model_card_private,
        should_stop=should_stop,
    )


def repository_name(config: RunConfig) -> str:
    """owner/name, or name for the owner of the login."""
    return config.publishing.hub_model_id or config.tracking.tracker_project_name

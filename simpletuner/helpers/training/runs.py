"""Trains a run, and before it the run that validation_compared_config names."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, release_memory

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.reporting.run_summary import load_summary
from simpletuner.helpers.sampling.prompts import expand_prompts
from simpletuner.helpers.training.build import build_trainer
from simpletuner.helpers.training.preparing import check_uploads, finished_run, prepare_run
from simpletuner.helpers.training.trainer import Trainer

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train a run, after the run that `validation_compared_config` names if that is unfinished.

    Returns:
        The exit code: 0 when finished, 75 when a signal stopped either run; the same call resumes.

    Raises:
        SimpleTunerError: A part that a run needs is missing or does not fit, or training failed.
    """
    for other in reversed(unfinished(config)):
        logger.info("Training %s first: validation compares its adapter with this run's.", other.source)
        code = _train_first(other)
        if code != 0:
            return code
    return build_trainer(config).run()


def unfinished(config: RunConfig) -> list[RunConfig]:
    """The unfinished runs that this run is compared with, each compared with the next one.

    Raises:
        SimpleTunerError: A part that a run needs is missing or does not fit.
    """
    other = config.compared_with
    if other is None or is_finished(other) or not _has_validations_left(config):
        return []
    return [other, *unfinished(other)]


def is_finished(config: RunConfig) -> bool:
    """Whether a run has reached its last step, and its adapter is there and whole."""
    output_dir = config.checkpoint.output_dir
    summary = load_summary(output_dir)
    if summary is None or summary.step < (config.training.max_train_steps or 0):
        return False
    return not summary.damage(output_dir)


def _has_validations_left(config: RunConfig) -> bool:
    """Whether a run will generate images. Reports its errors now, not after hours of training another run."""
    if not expand_prompts(config.validation, seed=config.training.seed):
        return False
    with ExitStack() as resources:
        context = prepare_run(config, resources)
        context.preemption.check("checking the compared runs")
        has_steps_left = finished_run(context) is None
        if has_steps_left:
            check_uploads(context)
    _reset_accelerate()
    return has_steps_left


def _train_first(config: RunConfig) -> int:
    run = build_trainer(config)
    code = run.run()
    # A signal may arrive after that run has finished and before the next one starts.
    if isinstance(run, Trainer) and run.preemption.requested:
        code = EXIT_PREEMPTED
    del run
    release_memory()
    code = max(map(int, gather_object([code])))  # a signal may reach only one of several processes
    _reset_accelerate()
    return code


def _reset_accelerate() -> None:
    """Reset precision and gradient accumulation, which accelerate keeps for the whole process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()

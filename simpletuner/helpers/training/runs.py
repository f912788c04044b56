"""A run from its configuration to its exit code, and before it the run that it is compared with."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, release_memory

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.reporting.run_summary import load_report
from simpletuner.helpers.sampling.prompts import expand_prompts
from simpletuner.helpers.training.build import build_trainer, finished_run, prepare_run
from simpletuner.helpers.training.trainer import Trainer

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train a run, after the one that its `validation_compared_config` names where that is not finished.

    Returns:
        The exit code: 0 when finished, 75 when a signal ended either of them; the same call goes on.

    Raises:
        SimpleTunerError: Something that a run needs is missing or does not fit, or its training failed.
    """
    for other in reversed(unfinished(config)):
        logger.info("Training %s first: its adapter is shown beside this run's.", other.source)
        code = _train_first(other)
        if code != 0:
            return code
    return build_trainer(config).run()


def unfinished(config: RunConfig) -> list[RunConfig]:
    """The runs whose adapters are wanted and not there yet; each is wanted by the one before it.

    Raises:
        SimpleTunerError: Something that a run needs is missing or does not fit.
    """
    other = config.compared_with
    if other is None or is_finished(other) or not _makes_pictures(config):
        return []
    return [other, *unfinished(other)]


def is_finished(config: RunConfig) -> bool:
    """Whether a run has been trained to its last step."""
    report = load_report(config.checkpoint.output_dir)
    return report is not None and report.step >= (config.training.max_train_steps or 0)


def _makes_pictures(config: RunConfig) -> bool:
    """Whether a run has pictures to make; what is wrong with it is told now, not after the other's hours."""
    if not expand_prompts(config.validation, seed=config.training.seed):
        return False
    with ExitStack() as resources:
        context = prepare_run(config, resources)
        context.preemption.check("looking what there is to train")
        goes_on = finished_run(context) is None
    _forget_settings()
    return goes_on


def _train_first(config: RunConfig) -> int:
    run = build_trainer(config)
    code = run.run()
    # A signal in its last moments finds that run finished, and the one after it not begun.
    if isinstance(run, Trainer) and run.preemption.requested:
        code = EXIT_PREEMPTED
    del run
    release_memory()
    code = max(map(int, gather_object([code])))  # a signal may have come to one of several processes
    _forget_settings()
    return code


def _forget_settings() -> None:
    """Let the next run set precision and accumulation, which accelerate keeps for a process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()

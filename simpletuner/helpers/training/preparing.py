"""What a run needs before weights are loaded: device, output folder, checkpoint, data, trackers, uploads."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedType

from simpletuner.helpers.caching.prefetch import FIRST_NOTICE_S, LoaderWatch
from simpletuner.helpers.checkpointing.branch import Branch, save_branch
from simpletuner.helpers.checkpointing.changes import hidden_facts, record_changes
from simpletuner.helpers.checkpointing.checkpoints import (
    Checkpoint,
    branch_from,
    find_checkpoint,
    remove_unfinished,
)
from simpletuner.helpers.checkpointing.fingerprint import (
    resume_fingerprint,
)
from simpletuner.helpers.checkpointing.preemption import Preemption
from simpletuner.helpers.checkpointing.requests import remove_requests
from simpletuner.helpers.configuration.loading.rules import training_size
from simpletuner.helpers.configuration.translation_lines import translation_lines
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.io.run_folder import CONFIG_FILE, EXIT_FILE, INDEX_FOLDER, SUMMARY_FILE
from simpletuner.helpers.models.clip_score import ClipScorer
from simpletuner.helpers.models.depth import DepthModels
from simpletuner.helpers.models.family import FamilyContext, ModelFamily
from simpletuner.helpers.models.rank_forecast import expected_mean_rank, is_low
from simpletuner.helpers.models.registry import load_family, specs
from simpletuner.helpers.models.weights_on_disk import num_denoiser_weights
from simpletuner.helpers.publishing.uploads import Uploads, check_login
from simpletuner.helpers.reporting.run_summary import FinishedRun, load_summary
from simpletuner.helpers.reporting.trackers import Trackers, build_trackers
from simpletuner.helpers.training.accelerator import (
    build_accelerator,
    check_distribution,
    with_shared_seed,
)
from simpletuner.helpers.training.device import device_memory, device_name, refuse_cpu
from simpletuner.helpers.training.final_files import restore_damaged
from simpletuner.helpers.training.finished import repository_name, uploads_of
from simpletuner.helpers.training.fitting import check_fit
from simpletuner.helpers.training.lost_processes import naming_lost_processes
from simpletuner.helpers.training.packages import check_packages
from simpletuner.helpers.training.plan import rank_line, warnings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.io.atomic import JsonValue

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """Everything built before weights are loaded."""

    config: RunConfig
    accelerator: Accelerator
    preemption: Preemption
    resumed: Checkpoint | None
    family: ModelFamily
    data: TrainingData
    scorer: ClipScorer | None = None

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the whole run; less data is left once damaged images were found."""
        return self.data.calendar.num_steps(self.config.training)

    @property
    def step(self) -> int:
        """Optimiser steps taken before this start."""
        return 0 if self.resumed is None else self.resumed.step

    @property
    def data_facts(self) -> dict[str, JsonValue]:
        """What a checkpoint holds of the data, for the comparison on resume."""
        return {**self.data.facts(), **hidden_facts(self.config)}

    @property
    def branch(self) -> Branch | None:
        """The branch that the run is on, if it went back to an earlier checkpoint."""
        return branch_from(self.resumed, self.config.checkpoint)


def prepare_run(config: RunConfig, resources: ExitStack) -> RunContext:
    """Check and build everything that needs no weights: device, output folder, checkpoint, data."""
    check_packages(config)
    accelerator = build_accelerator(config)
    config = with_shared_seed(config)
    check_distribution(config, accelerator)
    device = accelerator.device
    is_sharded = accelerator.distributed_type == DistributedType.FSDP  # no device holds the whole model
    check_fit(config, memory_bytes=None if is_sharded else device_memory(device))
    # Before a model is downloaded; below once more, of a repository whose size is known only then.
    refuse_cpu(
        config, device, num_weights=num_denoiser_weights(config.model, specs()[config.model.model_family])
    )
    resources.enter_context(naming_lost_processes(accelerator))
    preemption = resources.enter_context(Preemption())
    if accelerator.is_main_process:
        resources.enter_context(run_lock(config.checkpoint.output_dir))
        remove_unfinished(config.checkpoint.output_dir)
        remove_requests(config.checkpoint.output_dir)
        (config.checkpoint.output_dir / EXIT_FILE).unlink(missing_ok=True)  # of the run before
    accelerator.wait_for_everyone()
    resumed = find_checkpoint(config.checkpoint, settings=resume_fingerprint(config))
    family = build_family(config, device=accelerator.device)
    refuse_cpu(config, device, num_weights=family.components.denoiser.num_weights())
    watch = build_watch(config, accelerator, preemption)
    with first_process_first(accelerator):
        data = build_data(
            config,
            family=family,
            watch=watch,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
    return RunContext(
        config=config,
        accelerator=accelerator,
        preemption=preemption,
        resumed=resumed,
        family=family,
        data=data,
    )


def report_plan(context: RunContext) -> None:
    """Log the device, the expected mean active rank, and what a person may not have meant."""
    config, family = context.config, context.family
    for text in translation_lines(config):
        logger.info("%s", text)
    name, precision = device_name(context.accelerator.device), config.precision.mixed_precision
    logger.info("Device: %s; mixed_precision %s.", name, precision)
    forecast = expected_mean_rank(
        config,
        family.spec,
        scheduler=family.components.scheduler.config,
        size=training_size(config.data, family.spec),
    )
    if forecast is not None and config.lycoris is not None:
        level = logging.WARNING if is_low(forecast, config.lycoris) else logging.INFO
        logger.log(level, "%s: %s.", config.algorithm.title, rank_line(forecast, config))
    for text in warnings_of(config, family.spec, calendar=context.data.calendar):
        logger.warning("%s", text)


def finished_run(context: RunContext) -> FinishedRun | None:
    """The finished run, if it has no steps left; its adapter is written again if it is damaged or gone."""
    output_dir, resumed = context.config.checkpoint.output_dir, context.resumed
    summary = load_summary(output_dir)
    if summary is None or resumed is None or not summary.step == resumed.step >= context.max_steps:
        return None
    if context.accelerator.is_main_process:
        restore_damaged(summary, output_dir, checkpoint=resumed.path, spec=context.family.spec)
    return FinishedRun(summary, context.max_steps, build_uploads(context))


def check_uploads(context: RunContext) -> None:
    """Check the login of a run that uploads, and find or create its repository.

    Raises:
        ConfigError: There is no valid login, or it may not write there.
    """
    publishing = context.config.publishing
    if publishing.push_to_hub and context.accelerator.is_main_process:
        check_login(
            repository_name(context.config),
            private=publishing.model_card_private,
            output_dir=context.config.checkpoint.output_dir,
        )


def build_uploads(context: RunContext) -> Uploads:
    """The uploads of the run, on the main process; not yet started."""
    return uploads_of(
        context.config,
        is_main_process=context.accelerator.is_main_process,
        should_stop=lambda: context.preemption.requested,
    )


def build_family(config: RunConfig, *, device: torch.device) -> ModelFamily:
    """The model's family, before any weights are loaded."""
    return load_family(config.model.model_family)(
        FamilyContext(
            model=config.model,
            noise=config.noise,
            precision=config.precision,
            device=device,
            weight_dtype=WEIGHT_DTYPES[config.precision.mixed_precision],
        )
    )


def build_watch(config: RunConfig, accelerator: Accelerator, preemption: Preemption) -> LoaderWatch:
    """The watch of the wait for the loader."""
    watch = LoaderWatch(timeout_s=config.data.loader_timeout_seconds, check=preemption.check)
    # A process that ends in mid-step takes the others with it: several wait until the loader surely hangs.
    return watch if accelerator.num_processes == 1 else replace(watch, stop_after_s=FIRST_NOTICE_S)


@contextmanager
def first_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the first process of each machine scan; the others then find what it read in its index.

    They follow also if it fails, so that no process waits for one that is gone.
    """
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()


def build_data(
    config: RunConfig,
    *,
    family: ModelFamily,
    watch: LoaderWatch,
    num_processes: int = 1,
    process_index: int = 0,
) -> TrainingData:
    """The samples of this process and their order."""
    return TrainingData(
        config.datasets,
        config.data,
        seed=config.training.seed,
        batch_size=config.training.train_batch_size,
        num_processes=num_processes,
        process_index=process_index,
        pixel_alignment=family.spec.pixel_alignment,
        training=config.training,
        caption_dropout=config.training.caption_dropout_probability,
        balances_regularisation=config.regularisation.regularisation_target == "data",
        conditioning=(*config.conditioning, *config.references),
        caches_text=not config.trains_text,
        masks=config.masks,
        depth=DepthModels(),
        pins_batches=family.device.type == "cuda",
        index_folder=config.checkpoint.output_dir / INDEX_FOLDER,
        watch=watch,
    )


def build_scorer(config: RunConfig, accelerator: Accelerator) -> ClipScorer | None:
    """The model of evaluation_type, on the main process of a run with validation images.

    Raises:
        ModelError: It cannot be found.
    """
    validation = config.validation
    has_images = bool(validation.prompts) and not validation.validation_disable
    if validation.evaluation_type == "none" or not has_images or not accelerator.is_main_process:
        return None
    return ClipScorer(validation.pretrained_evaluation_model_name_or_path, device=accelerator.device)


def build_run_trackers(context: RunContext) -> Trackers:
    """The trackers of the run on the main process, none on the others; marks the run as begun.

    Raises:
        MissingDependencyError: The package of a tracker is not installed.
    """
    if not context.accelerator.is_main_process:
        return Trackers(None)
    config, output_dir = context.config, context.config.checkpoint.output_dir
    (output_dir / SUMMARY_FILE).unlink(missing_ok=True)
    save_branch(output_dir, context.branch)
    resolved = config.resolved()
    record_changes(output_dir, context.resumed, resolved=resolved, data=context.data_facts)
    write_json(output_dir / CONFIG_FILE, resolved)
    return build_trackers(
        config.tracking,
        output_dir=output_dir,
        settings=resolved,
        resumed_step=context.step,
        evaluates=config.evaluates,
    )

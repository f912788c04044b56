"""Builds a run from its configuration: with `preparing`, the only modules that wire the parts together."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from torch.nn.parallel import DistributedDataParallel

from simpletuner.helpers.adapters.ema import Ema
from simpletuner.helpers.adapters.network import attach_adapter
from simpletuner.helpers.adapters.sharding import shard_adapters, shard_model
from simpletuner.helpers.checkpointing.changes import DATA_PART
from simpletuner.helpers.checkpointing.checkpoints import (
    Checkpoint,
    Checkpoints,
    check_compatible,
)
from simpletuner.helpers.checkpointing.fingerprint import (
    adapter_metadata,
    resume_fingerprint,
    token_facts,
)
from simpletuner.helpers.checkpointing.intervals import Epochs
from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.checkpointing.requests import RunRequests
from simpletuner.helpers.checkpointing.state import RunState
from simpletuner.helpers.checkpointing.weight_identity import base_weights_hash, weight_hashes
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.run_folder import VALIDATION_FOLDER
from simpletuner.helpers.models.compiling import compile_for_training
from simpletuner.helpers.models.group_offload import offload_groups
from simpletuner.helpers.models.quantisation import quantize_and_move
from simpletuner.helpers.models.recomputing import recompute_blocks
from simpletuner.helpers.models.token_routing import TokenRouting
from simpletuner.helpers.models.whole_model import WholeModel
from simpletuner.helpers.reporting.html_report.manifest import build_manifest
from simpletuner.helpers.reporting.html_report.writer import RunPage
from simpletuner.helpers.reporting.progress_bar import ProgressDisplay
from simpletuner.helpers.reporting.run_summary import FinishedRun
from simpletuner.helpers.reporting.trackers import Trackers
from simpletuner.helpers.sampling.comparison import build_comparison
from simpletuner.helpers.sampling.prompts import PromptSpec, expand_prompts
from simpletuner.helpers.sampling.references import with_references
from simpletuner.helpers.sampling.validation_sampler import ValidationSampler
from simpletuner.helpers.training.caches import fill_caches
from simpletuner.helpers.training.evaluation import Evaluation
from simpletuner.helpers.training.final_files import FinalFiles
from simpletuner.helpers.training.lr_schedules import build_lr_schedule
from simpletuner.helpers.training.objective import Objective, build_objective
from simpletuner.helpers.training.optimizers import build_optimizer, weights_for_use
from simpletuner.helpers.training.preparing import (
    RunContext,
    build_run_trackers,
    build_scorer,
    build_uploads,
    check_uploads,
    finished_run,
    prepare_run,
    report_plan,
)
from simpletuner.helpers.training.regularisation import build_regularisation
from simpletuner.helpers.training.text_encoding import (
    TextEncoding,
    build_text_encoding,
    new_token,
    present_embeds,
    with_text_encoders,
)
from simpletuner.helpers.training.token_captions import check_captions
from simpletuner.helpers.training.trainer import Trainer
from simpletuner.helpers.training.validation import Validation
from simpletuner.helpers.training.weight_optimizer import build_weight_optimizer, steps_one_by_one

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate.optimizer import AcceleratedOptimizer
    from torch import nn
    from torch.optim import Optimizer

    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.io.atomic import JsonValue

logger = logging.getLogger(__name__)

SMALL_MODEL = 50_000_000
"""Number of weights; the demo's model has five million."""


def build_trainer(config: RunConfig) -> Trainer | FinishedRun:
    """Prepare a run up to its next step: lock, data, caches, model, adapter, optimiser, resumed state.

    Raises:
        SimpleTunerError: A part that the run needs is missing or does not fit.
    """
    with ExitStack() as resources:  # closed if a step below fails, else passed to the trainer
        context = prepare_run(config, resources)
        config = context.config
        finished = finished_run(context)
        if finished is not None:
            return finished
        check_captions(config, context.data.divided.trained_captions())
        context = replace(context, scorer=build_scorer(config, context.accelerator))
        report_plan(context)
        check_uploads(context)
        trackers = build_run_trackers(context)
        prompts = build_prompts(context)
        fill_caches(
            context.data,
            prompts,
            config=config,
            family=context.family,
            accelerator=context.accelerator,
            preemption=context.preemption,
        )
        resources.callback(context.data.flush)
        return build_components(context, prompts=prompts, trackers=trackers, resources=resources)


def build_prompts(context: RunContext) -> tuple[PromptSpec, ...]:
    """The prompts of validation images, with their reference images cut as those of the data are.

    Raises:
        DataError: A reference image cannot be used.
    """
    config, alignment = context.config, context.family.spec.pixel_alignment
    return with_references(
        expand_prompts(config.validation, seed=config.training.seed),
        alignment=config.data.alignment(alignment),
        fills_image=config.has_references
        and all(each.conditioning_type == "reference_strict" for each in config.references),
    )


def build_components(
    context: RunContext, *, prompts: tuple[PromptSpec, ...], trackers: Trackers, resources: ExitStack
) -> Trainer:
    """Load the denoiser, attach the adapter, load the resumed state, and build the trainer."""
    config, accelerator, data = context.config, context.accelerator, context.data
    is_offloaded, device = config.precision.enable_group_offload, accelerator.device
    denoiser, hashes = load_denoiser(context)
    base_model = base_weights_hash(hashes)
    # The display counts the images that the validation below still generates.
    display = ProgressDisplay(
        total_steps=context.max_steps,
        step=context.step,
        enabled=accelerator.is_main_process,
        images_left=lambda step: validation.images_left(step, max_steps=context.max_steps),
        output_dir=config.checkpoint.output_dir,
    )
    sampler = build_sampler(context, prompts, base_model=base_model, display=display)
    comparison = build_comparison(config, sampler)
    if comparison is not None and accelerator.is_main_process:
        comparison.generate_missing(denoiser)
    if config.model.is_full and accelerator.is_main_process:
        sampler.generate_base(denoiser)
    trainable = build_trainable(context, denoiser, weight_hashes=hashes)
    if config.precision.base_model_precision != UNCHANGED:
        ddp_ignore_frozen(denoiser)
    if is_offloaded:
        offload_groups(denoiser, config.precision, device=device)
    if accelerator.distributed_type == DistributedType.FSDP:
        (shard_model if config.model.is_full else shard_adapters)(denoiser)
    compile_for_training(denoiser, config.compiling)
    optimizer = build_optimizer(trainable.groups(), config.optimizer)
    state = RunState(
        trainable=trainable,
        optimizer=optimizer,
        progress=Progress(),
        metadata=adapter_metadata(
            config, data, spec=context.family.spec, scheduler=context.family.components.scheduler.config
        ),
        scaler=accelerator.scaler,
        averages=partial(weights_for_use, optimizer, config.optimizer),
        ema=build_ema(config, trainable, device=device),
    )
    if context.resumed is not None:
        resume(state, context.resumed)
    weight_optimizer = build_weight_optimizer(config, optimizer, state.progress)
    stepped = weight_optimizer or optimizer
    schedule = build_lr_schedule(stepped, config.optimizer, max_steps=context.max_steps, step=context.step)
    prepared, prepared_optimizer = prepare(context, denoiser, stepped)
    epochs = build_epochs(context, state)
    validation = Validation(
        sampler=sampler,
        trainable=trainable,
        denoiser=denoiser,
        title=config.algorithm.title,
        comparison=comparison,
        trackers=trackers,
        scorer=context.scorer,
        epochs=epochs,
        averages=state.averages,
        ema=state.ema,
    )
    text_encoding = build_text_encoding(config, context.family, trainable, progress=state.progress)
    objective = build_objective(config, context.family, state.progress)
    checkpoints = build_checkpoints(context, state, weights=identity_of(context, hashes), epochs=epochs)
    return Trainer(
        config=config,
        accelerator=accelerator,
        family=context.family,
        denoiser=prepared,
        trainable=trainable,
        data=data,
        optimizer=prepared_optimizer,
        lr_schedule=schedule,
        objective=objective,
        regularisation=build_regularisation(config, context.family, trainable, text_encoding=text_encoding),
        text_encoding=text_encoding,
        token_routing=build_token_routing(config, denoiser),
        weight_optimizer=weight_optimizer,
        state=state,
        checkpoints=checkpoints,
        validation=validation,
        evaluation=build_evaluation(
            context,
            state,
            denoiser=prepared,
            objective=objective,
            text_encoding=text_encoding,
            trackers=trackers,
            epochs=epochs,
        ),
        trackers=trackers,
        display=display,
        page=build_page(context, state, images=validation.manifest()),
        final_files=build_final_files(context, state),
        uploads=build_uploads(context),
        preemption=context.preemption,
        requests=RunRequests(output_dir=config.checkpoint.output_dir, is_enabled=accelerator.is_main_process),
        max_steps=context.max_steps,
        resources=resources.pop_all(),
    )


def load_denoiser(context: RunContext) -> tuple[nn.Module, dict[str, str]]:
    """The denoiser in its precision, and the hash of each weight before it was quantised.

    Raises:
        ModelError: It does not load.
        CheckpointError: The resumed run began with other weights.
    """
    logger.info("Loading the denoiser.")
    precision, device = context.config.precision, context.accelerator.device
    denoiser = context.family.load_denoiser()
    limit_cpu_threads(denoiser, device)
    hashes = weight_hashes(denoiser)
    if context.resumed is not None:
        check_compatible(context.resumed, "weights", identity_of(context, hashes))
    denoiser = quantize_and_move(
        denoiser,
        precision=precision.base_model_precision,
        device=device,
        home=context.family.denoiser_device if precision.enable_group_offload else device,
    )
    return denoiser, hashes


def identity_of(context: RunContext, hashes: Mapping[str, str]) -> dict[str, JsonValue]:
    """What a checkpoint holds of the weights that the trained ones stand beside."""
    identity: dict[str, JsonValue] = {"base weights": base_weights_hash(hashes)}
    if context.config.trains_text:
        identity["text encoders"] = context.family.text_identity
    return identity


def prepare(
    context: RunContext, denoiser: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Denoiser and optimiser as accelerate runs them; a sharded whole model stays as it is."""
    config, accelerator = context.config, context.accelerator
    # The optimiser's state is where its parameters are; accelerate would cast it to their dtype.
    if config.model.is_full and accelerator.distributed_type == DistributedType.FSDP:
        return denoiser, accelerator.prepare_optimizer(optimizer, device_placement=False)
    moves_denoiser = not config.precision.enable_group_offload
    if config.model.model_type == "embedding":  # DDP refuses a model without a trained weight
        frozen = accelerator.prepare_model(denoiser, device_placement=moves_denoiser, evaluation_mode=True)
        return frozen, accelerator.prepare_optimizer(optimizer, device_placement=False)
    # accelerate looks parameters up by their address, which all empty shards share: of a rank below the
    # number of processes.
    parameters = [[*group["params"]] for group in optimizer.param_groups]
    prepared: tuple[nn.Module, AcceleratedOptimizer] = accelerator.prepare(
        denoiser, optimizer, device_placement=[moves_denoiser, False]
    )
    for group, own in zip(optimizer.param_groups, parameters, strict=True):
        group["params"] = own
    return prepared


def limit_cpu_threads(denoiser: nn.Module, device: torch.device) -> None:
    """Compute a small model on one CPU thread, unless OMP_NUM_THREADS is set.

    Two threads are no faster (60 steps of the demo: 11 s on one, 11 to 17 s on two, which spin while they
    wait), and other programs slow them down more.
    """
    num_weights = sum(weight.numel() for weight in denoiser.parameters())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and num_weights < SMALL_MODEL:
        torch.set_num_threads(1)


def build_sampler(
    context: RunContext, prompts: tuple[PromptSpec, ...], *, base_model: str, display: ProgressDisplay
) -> ValidationSampler:
    """The sampler of validation images."""
    precision, token = context.config.precision.base_model_precision, token_facts(context.config.new_tokens)
    base_model += "" if precision == UNCHANGED else f" {precision}"
    base_model += f" {token}" if token else ""
    return ValidationSampler(
        config=context.config.validation,
        compiling=context.config.compiling,
        accelerator=context.accelerator,
        family=context.family,
        prompts=prompts,
        text_embeds=context.data.text_embeds if context.data.caches_text else present_embeds(context.family),
        folder=context.config.checkpoint.output_dir / VALIDATION_FOLDER,
        base_model=base_model,
        preemption=context.preemption,
        progress=display.image,
    )


def build_trainable(
    context: RunContext, denoiser: nn.Module, *, weight_hashes: Mapping[str, str]
) -> Trainable:
    """What the run trains, with the denoiser in training mode: its own weights, or an adapter on it."""
    config, accelerator = context.config, context.accelerator
    if config.training.gradient_checkpointing:
        recompute_blocks(denoiser, interval=config.training.gradient_checkpointing_interval or 1)
    denoiser.train()
    accelerator._tlora_config, accelerator._tlora_active = None, False
    accelerator._lycoris_wrapped_network = None
    trainable: Trainable
    if config.model.is_full:
        trainable = WholeModel(
            denoiser,
            folder=context.family.spec.denoiser_name,
            layer_filter=config.whole_model.layer_filter,
            one_by_one=steps_one_by_one(config),
        )
    elif not config.model.has_adapter:
        trainable = new_token(config, context.family)
    else:
        trainable = adapter = attach_adapter(
            denoiser,
            config.adapter,
            lycoris=config.lycoris,
            spec=context.family.spec,
            seed=config.training.seed,
            weight_hashes=weight_hashes,
        )
        trainable = adapter = with_text_encoders(adapter, config, context.family)
        # Other people's code reads these from the accelerator.
        accelerator._tlora_config = adapter.tlora_config
        accelerator._tlora_active = adapter.tlora_config is not None
        accelerator._lycoris_wrapped_network = adapter.lycoris_network
    logger.info(
        "%s: %s, %d trainable parameters.",
        config.algorithm.title,
        counted(trainable.num_layers, "layer"),
        sum(parameter.numel() for parameter in trainable.parameters()),
    )
    return trainable


def build_ema(config: RunConfig, trainable: Trainable, *, device: torch.device) -> Ema | None:
    """The moving average of the present weights, on the host or on this device; None without."""
    if not config.ema.use_ema:
        return None
    return Ema(
        trainable, config.ema, device=torch.device("cpu") if config.ema.ema_device == "cpu" else device
    )


def build_evaluation(
    context: RunContext,
    state: RunState,
    *,
    denoiser: nn.Module,
    objective: Objective,
    text_encoding: TextEncoding,
    trackers: Trackers,
    epochs: Epochs,
) -> Evaluation:
    """What measures the loss of held-out images; of the EMA, where validation shows that alone."""
    weights = state.averages
    if state.ema is not None and state.ema.config.ema_validation == "ema_only":
        weights = state.ema.weights
    return Evaluation(
        config=context.config.evaluation,
        accelerator=context.accelerator,
        denoiser=denoiser,
        trainable=state.trainable,
        objective=objective,
        text_encoding=text_encoding,
        data=context.data,
        trackers=trackers,
        preemption=context.preemption,
        output_dir=context.config.checkpoint.output_dir,
        weights=weights,
        epochs=epochs,
    )


def build_final_files(context: RunContext, state: RunState) -> FinalFiles:
    """What writes the files of the finished run."""
    return FinalFiles(
        output_dir=context.config.checkpoint.output_dir,
        state=state,
        is_main_process=context.accelerator.is_main_process,
        spec=context.family.spec,
        exports_to_comfyui=context.config.adapter.lora_format == "comfyui",
    )


def build_checkpoints(
    context: RunContext, state: RunState, *, weights: Mapping[str, JsonValue], epochs: Epochs
) -> Checkpoints:
    """The checkpoints of the run; `weights` identifies the base model's."""
    config = context.config
    return Checkpoints(
        config=config.checkpoint,
        state=state,
        compatibility={
            "settings": resume_fingerprint(config),
            "weights": weights,
            DATA_PART: context.data_facts,
        },
        resolved=config.resolved(),
        is_main_process=context.accelerator.is_main_process,
        saved_step=None if context.resumed is None else context.resumed.step,
        epochs=epochs,
        branch=context.branch,
    )


def build_token_routing(config: RunConfig, denoiser: nn.Module) -> TokenRouting | None:
    """Token routing on the denoiser, if the run has it."""
    tread = config.training.tread_config
    return None if tread is None else TokenRouting(denoiser, tread, seed=config.training.seed)


def build_epochs(context: RunContext, state: RunState) -> Epochs:
    """Where the epochs of the run end, counted from the step that it goes on from.

    Raises:
        CheckpointError: The samples so far are no whole number of this run's batches, or the steps so far had
            another number of images, and a dataset begins or ends at a step.
    """
    training, progress = context.config.training, state.progress
    batches = context.data.batches_before(progress.samples)
    if context.data.counts_steps and batches != progress.step * training.gradient_accumulation_steps:
        raise CheckpointError(
            f"The {progress.step} steps of the checkpoint had {progress.samples} images, another number than "
            "here, so datasets would begin and end at other steps than start_step and end_step say. Resume "
            "with the same product of processes, train_batch_size and gradient_accumulation_steps."
        )
    return Epochs(
        calendar=context.data.calendar,
        batches_per_step=training.gradient_accumulation_steps,
        step=progress.step,
        batches=batches,
    )


def build_page(context: RunContext, state: RunState, *, images: Mapping[str, Any]) -> RunPage:
    """The HTML report of the run; `images` is its part on validation images."""
    manifest = partial(
        build_manifest,
        config=context.config,
        spec=context.family.spec,
        trainable=state.trainable,
        data=context.data,
        images=images,
        max_steps=context.max_steps,
        device=context.accelerator.device,
        num_processes=context.accelerator.num_processes,
    )
    return RunPage(
        context.config.checkpoint.output_dir,
        is_enabled=context.accelerator.is_main_process,
        manifest=manifest,
        step=lambda: state.progress.step,
    )


def ddp_ignore_frozen(denoiser: nn.Module) -> None:
    """Exclude frozen weights from DDP's broadcast: all ranks hold them, and quantised ones cannot be sent."""
    frozen = [name for name, weight in denoiser.named_parameters() if not weight.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        denoiser, frozen
    )


def resume(state: RunState, checkpoint: Checkpoint) -> None:
    """Load the state of a checkpoint.

    Raises:
        CheckpointError: Its files do not fit this run, or its folder was renamed.
    """
    state.load(checkpoint.path)
    if state.progress.step != checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.path}: the folder name says step {checkpoint.step}, its state step "
            f"{state.progress.step}. Restore the folder's name."
        )
    logger.info("Resumed from %s.", checkpoint.path)

"""The life of a run: train, log, save, validate, finish."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.adapters.sharding import full_tensor
from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED, Preempted, mark_stop_wanted
from simpletuner.helpers.checkpointing.requests import REQUESTS, Answer
from simpletuner.helpers.contracts import MicroBatchOutput
from simpletuner.helpers.errors import LoaderTimeoutError, TrainingError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.process import peak_memory_mib
from simpletuner.helpers.randomness import mix
from simpletuner.helpers.reporting.metrics import StepAccumulator, StepMetrics, peak_device_memory_mib
from simpletuner.helpers.reporting.webhooks import Kind, Message
from simpletuner.helpers.training.accelerator import in_any_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager, ExitStack

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LambdaLR

    from simpletuner.helpers.adapters.trainable import ParameterGroup, Trainable
    from simpletuner.helpers.checkpointing.checkpoints import Checkpoints
    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.checkpointing.progress import Progress
    from simpletuner.helpers.checkpointing.requests import RunRequests
    from simpletuner.helpers.checkpointing.state import RunState
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.configuration.schema.tracking import Level
    from simpletuner.helpers.contracts import Batch
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.models.token_routing import TokenRouting
    from simpletuner.helpers.publishing.uploads import Uploads
    from simpletuner.helpers.reporting.html_report.writer import RunPage
    from simpletuner.helpers.reporting.progress_bar import ProgressDisplay
    from simpletuner.helpers.reporting.trackers import Trackers
    from simpletuner.helpers.training.evaluation import Evaluation
    from simpletuner.helpers.training.final_files import FinalFiles
    from simpletuner.helpers.training.objective import Objective
    from simpletuner.helpers.training.regularisation import Regularisation
    from simpletuner.helpers.training.text_encoding import TextEncoding
    from simpletuner.helpers.training.validation import Validation
    from simpletuner.helpers.training.weight_optimizer import WeightOptimizer

logger = logging.getLogger(__name__)

# A new gradient scaler overflows a few times until it finds its scale; after this many it has none left.
MAX_SKIPPED_STEPS = 25
# A scheduler kills a stopped run after 30 seconds or so, and then its exit code says nothing.
STOP_WAIT_S = 5.0
SIGNAL = "signal"


@dataclass(kw_only=True)
class Trainer:
    """Trains what one run trains. `build_trainer` builds it with all its parts."""

    config: RunConfig
    accelerator: Accelerator
    family: ModelFamily
    denoiser: nn.Module
    """As accelerate prepared it, the adapter inside."""
    trainable: Trainable
    data: TrainingData
    optimizer: AcceleratedOptimizer
    lr_schedule: LambdaLR
    objective: Objective
    regularisation: Regularisation
    text_encoding: TextEncoding
    state: RunState
    checkpoints: Checkpoints
    validation: Validation
    evaluation: Evaluation
    trackers: Trackers
    display: ProgressDisplay
    page: RunPage
    final_files: FinalFiles
    uploads: Uploads
    preemption: Preemption
    requests: RunRequests
    max_steps: int
    resources: ExitStack
    """Run lock and signal handlers, held until the run ends."""
    token_routing: TokenRouting | None = None
    weight_optimizer: WeightOptimizer | None = None
    """What steps the weights of a whole model."""
    metrics: StepAccumulator = field(default_factory=StepAccumulator)
    skipped_steps: int = 0
    """Consecutive optimiser steps that the gradient scaler skipped."""
    is_state_checked: bool = False
    """A checkpoint can hold the optimiser's state, which is there from the first step on."""
    agreed: frozenset[str] = frozenset()
    """Requests that the main process found in the last step, and SIGNAL if some process had received one."""

    def run(self) -> int:
        """Train from the current step to the last one.

        Returns:
            The exit code: 0 when finished, 75 when a signal stopped the run after a checkpoint.

        Raises:
            TrainingError: A loss or gradient is not finite.
            CheckpointError: A checkpoint cannot be written, or cannot hold the optimiser's state.
            StorageError: The same, for lack of space or permission.
            LoaderTimeoutError: The loader took longer than loader_timeout_seconds.
            Preempted: With several processes, a stop signal arrived while this one's loader hung.
        """
        with self.resources, self.uploads, self.trackers, self._failure_notified(), self.page, self.display:
            self._notify("start", f"Training from step {self.progress.step} to {self.max_steps}")
            self.validation.start(self.progress.step)
            self.evaluation.start(self.progress.step)
            batches = self.data.batches(start=self.data.batches_before(self.progress.samples))
            self._take_steps(batches)
            if self.progress.step > 0:
                self.save_checkpoint()
            if not self.should_stop:
                self.final_files.save_weights()
                self.evaluation.run(self.progress.step)
                if not in_any_process(self.accelerator, flag=self.preemption.requested):
                    self.validation.run(self.progress.step, "final")
            # A signal that came after the last step reached one process, and all must end alike.
            if in_any_process(self.accelerator, flag=self.should_stop or self.preemption.requested):
                self.trackers.limit_wait(STOP_WAIT_S)
                self.page.write("stopped")
                reason = "a request" if "stop" in self.agreed else "a signal"
                self._notify(
                    "stopped", f"Stopped by {reason} at step {self.progress.step}; the next start goes on"
                )
                return EXIT_PREEMPTED
            grid, page = self.validation.grid_file(self.progress.step), self.page.write("finished")
            self.final_files.save_summary(grid=grid, page=page)
            self._notify("end", f"Finished after {self.progress.step} steps")
            self.uploads.request()
            return 0

    def close(self) -> None:
        """Release the resources of a trainer that will not run."""
        self.resources.close()

    @property
    def progress(self) -> Progress:
        """Steps and samples so far."""
        return self.state.progress

    @cached_property
    def groups(self) -> list[ParameterGroup]:
        """What is trained; walking the layers of an adapter takes milliseconds."""
        return self.trainable.groups()

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for group in self.groups for parameter in group.parameters]

    @property
    def should_stop(self) -> bool:
        """Whether a signal or a request ends the run; `apply_gradients` lets several processes agree."""
        is_alone = self.accelerator.num_processes == 1
        return bool(self.agreed & {"stop", SIGNAL}) or (is_alone and self.preemption.requested)

    def state_digest(self) -> str:
        """SHA-256 of the state that must survive a restart."""
        return self.state.digest()

    def optimizer_step(self, batches: Iterator[Batch]) -> StepMetrics:
        """Train on micro-batches until their gradients are applied.

        Raises:
            TrainingError: A loss or the gradient is not finite, or fp16 gradients overflow again and again.
        """
        started_s = time.perf_counter()
        for batch in batches:
            # The denoiser as prepared: accelerate looks for no_sync on it.
            with self.accelerator.accumulate(self.denoiser):
                self.train_step(batch.to(self.accelerator.device))
                if self.accelerator.sync_gradients:
                    self.apply_gradients()
                    break
        self.metrics.record("seconds", time.perf_counter() - started_s)
        self.metrics.record("memory_mib", peak_memory_mib())
        self.metrics.record("device_memory_mib", peak_device_memory_mib(self.accelerator.device))
        metrics = self.metrics.complete()
        self._count_skipped(metrics)
        if self.state.ema is not None and metrics.grad_norm is not None:  # else the step was skipped
            self.state.ema.update(metrics.step)
        return metrics

    def train_step(self, batch: Batch) -> MicroBatchOutput:
        """Forward and backward of one micro-batch; gradients are applied by the caller."""
        self._seed_dropout(batch)
        noisy = self.objective.add_noise(batch)
        noisy = self.regularisation.applied_to(noisy, batch, denoiser=self.denoiser)
        # Until backward ends: gradient checkpointing runs the forward again.
        with (
            self.trainable.rank_mask_for(noisy.timesteps),
            self.trainable.at_strength(batch.strength),
            self._routed(batch),
        ):
            prediction = self.family.predict(self.denoiser, noisy, self.text_encoding.encoded(batch))
            sample_losses = self.objective.sample_losses(prediction, noisy)  # [B]
            loss = sample_losses.mean()
            self.accelerator.backward(loss)
        output = MicroBatchOutput(
            loss=loss.detach(),
            sample_losses=sample_losses.detach(),
            samples=len(batch),
            timesteps=noisy.timesteps,
            active_rank=self.trainable.mean_active_rank(noisy.timesteps),
        )
        self.metrics.add(batch, output)
        self.metrics.record("mean_active_rank", output.active_rank, reduction="mean")
        return output

    def apply_gradients(self) -> None:
        """Clip the accumulated gradients and take one optimiser step.

        Raises:
            TrainingError: A loss or the gradient is not finite; no step is taken.
        """
        self.text_encoding.average_gradients(self.accelerator)
        self._drop_ended_gradients()
        self._record_rates()
        self.metrics.record("grad_norm", self._clip())
        step, wanted = self.progress.step + 1, self.requests.wanted()
        flags: dict[str, bool] = {each: each in wanted for each in REQUESTS}
        flags[SIGNAL] = self.preemption.requested
        self.agreed = self.metrics.reduce(self.accelerator, step=step, flags=flags)
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad()
        self.progress.advance(samples=self.metrics.num_samples * self.accelerator.num_processes)
        self.metrics.record("step", step)
        self.metrics.record("samples", self.progress.samples)
        batches = self.data.batches_before(self.progress.samples)
        self.metrics.record("epoch", self.data.calendar.epoch_of(batches - 1))

    def _seed_dropout(self, batch: Batch) -> None:
        """Seed the global generators, since dropout takes no other: a resumed run draws the same."""
        seed = mix(self.config.training.seed, "dropout", batch.sample_indices[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.7 ms where there is no GPU
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def _routed(self, batch: Batch) -> AbstractContextManager[None]:
        """Token routing of a micro-batch, if the run has it."""
        if self.token_routing is None:
            return nullcontext()
        return self.token_routing.routed(batch.sample_indices[0])

    def save_checkpoint(self) -> None:
        """Save the current step; every process takes part."""
        step, saved = self.progress.step, self.checkpoints.saved_step
        self.checkpoints.save()
        if saved != step:
            self._notify("checkpoint", f"Saved the checkpoint of step {step}")
        self.uploads.add_checkpoint(self.progress.step)
        self.accelerator.wait_for_everyone()

    def _notify(self, kind: Kind, text: str, *, level: Level = "info") -> None:
        self.trackers.notify(Message(kind=kind, text=text, step=self.progress.step, level=level))

    @contextmanager
    def _failure_notified(self) -> Iterator[None]:
        """Notify the webhooks of an error, which ends the run as without them."""
        try:
            yield
        except Preempted as stopped:
            self._notify("stopped", str(stopped))
            raise
        except BaseException as error:
            text = printable(f"{type(error).__name__}: {error}")
            self._notify("error", f"Step {self.progress.step}: {text}", level="error")
            raise

    def _take_steps(self, batches: Iterator[Batch]) -> None:
        """Train until the last step or a stop signal.

        When the loader hangs, the last whole step is saved; with several processes it is not, because the
        others wait for the gradients of this one.
        """
        is_alone = self.accelerator.num_processes == 1
        try:
            while self.progress.step < self.max_steps and not self.should_stop:
                self._after_step(self.optimizer_step(batches))
        except Preempted as stopped:
            if not is_alone:
                raise
            logger.warning("%s", stopped)
        except LoaderTimeoutError:
            if is_alone and self.progress.step > 0:
                self.save_checkpoint()
            raise

    def _after_step(self, metrics: StepMetrics) -> None:
        """Log, save, evaluate and validate, in that order, then answer requests."""
        step, asked = metrics.step, self.agreed.intersection(REQUESTS)
        if not self.is_state_checked:
            self.state.check_optimizer()
            self.is_state_checked = True
        self.display.update(metrics)
        self.trackers.log(metrics)
        if self.should_stop or "save" in asked or self.checkpoints.is_due(step):
            self.save_checkpoint()
        goes_on = step < self.max_steps and not self.should_stop
        if self.evaluation.is_due(step) and goes_on:
            self.evaluation.run(step)
        if (self.validation.is_due(step) and goes_on) or ("sample" in asked and not self.should_stop):
            self.validation.run(step)
        is_due = any(each.is_due(step) for each in (self.checkpoints, self.evaluation, self.validation))
        if asked:
            self._answer()
        elif is_due or self.page.is_old:
            self.page.refresh()

    def _answer(self) -> None:
        """Answer the requests of this step, and show them in the report."""
        step, has_prompts = self.progress.step, bool(self.validation.sampler.prompts)
        grid, saved = self.validation.grid_file(step), f"The checkpoint of step {step} is saved"
        if "stop" in self.agreed:
            mark_stop_wanted()
        else:
            self.page.write("running")
        if grid.exists():
            sample = Answer(f"Images of step {step}: {grid}")
        elif not has_prompts:
            sample = Answer(
                "This run generates no validation images. Set validation_prompt, and validation_disable to "
                "false, before its next start.",
                is_done=False,
            )
        else:
            reason = "the run stops" if self.should_stop else "its log says why"
            sample = Answer(f"No images of step {step}: {reason}.", is_done=False)
        self.requests.answer(
            {
                "save": Answer(f"{saved}."),
                "sample": sample,
                "stop": Answer(f"{saved}, and the run stops. The same command goes on."),
            }
        )

    def _drop_ended_gradients(self) -> None:
        """Leave parameters as they are from the end step of their group on."""
        for group in self.groups:
            if group.end_step is not None and self.progress.step >= group.end_step:
                for parameter in group.parameters:
                    parameter.grad = None

    def _record_rates(self) -> None:
        """Record the learning rate, and those of the groups that have another."""
        first, *others = map(float, self.lr_schedule.get_last_lr())
        names = [group.name for group in self.groups[1:]]
        different = {name: rate for name, rate in zip(names, others, strict=False) if rate != first}
        self.metrics.record("lr", first)
        self.metrics.record("lr_by_group", different or None)

    def _clip(self) -> Tensor:
        """Clip the gradients; returns their norm before that, a scalar."""
        if self.weight_optimizer is not None and self.weight_optimizer.in_backward:
            return self.weight_optimizer.gradient_norm()
        parameters, bound = self.parameters, self.config.training.max_grad_norm
        if self.config.training.grad_clip_method == "norm":
            return full_tensor(self.accelerator.clip_grad_norm_(parameters, bound or float("inf")))
        self.accelerator.unscale_gradients()
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if bound:
            torch.nn.utils.clip_grad_value_(parameters, bound)
        return norm

    def _count_skipped(self, metrics: StepMetrics) -> None:
        # A fused optimiser skips inside its kernel, which accelerate's step_was_skipped does not report.
        self.skipped_steps = self.skipped_steps + 1 if metrics.grad_norm is None else 0
        if self.skipped_steps > MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"Step {metrics.step}: fp16 gradients overflowed {self.skipped_steps} times in a row. "
                "Use mixed_precision bf16, or lower learning_rate."
            )

"""The life of a run: train, log, save, validate, finish."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.sharding import full_tensor, is_dtensor
from simpletuner.helpers.checkpointing.checkpoints import CONFIG_FILE
from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.contracts import MicroBatchOutput
from simpletuner.helpers.errors import SimpleTunerError, TrainingError
from simpletuner.helpers.randomness import mix
from simpletuner.helpers.reporting.html_report.writer import RunPage
from simpletuner.helpers.reporting.metrics import (
    Measured,
    StepAccumulator,
    StepMetrics,
    peak_device_memory_mib,
    peak_memory_mib,
)
from simpletuner.helpers.reporting.progress_bar import ProgressDisplay
from simpletuner.helpers.reporting.run_summary import ADAPTER_FILE as ADAPTER_FILE
from simpletuner.helpers.reporting.run_summary import COMFYUI_FILE, METRICS_FILE, Report
from simpletuner.helpers.training.losses import weighted_mse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LambdaLR

    from simpletuner.helpers.adapters.adapter import Adapter
    from simpletuner.helpers.checkpointing.checkpoints import Checkpoints
    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.checkpointing.progress import Progress
    from simpletuner.helpers.checkpointing.state import RunState
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import Batch
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.reporting.trackers import Trackers
    from simpletuner.helpers.training.validation import Validation

logger = logging.getLogger(__name__)

# A fresh gradient scaler overflows a few times to find its scale; this many in a row leave nothing of it.
MAX_SKIPPED_STEPS = 25


@dataclass(kw_only=True)
class Trainer:
    """One run over one model; `build_trainer` makes it."""

    config: RunConfig
    accelerator: Accelerator
    family: ModelFamily
    denoiser: nn.Module
    """As accelerate prepared it, the adapter inside."""
    adapter: Adapter
    data: TrainingData
    optimizer: AcceleratedOptimizer
    lr_schedule: LambdaLR
    state: RunState
    checkpoints: Checkpoints
    validation: Validation
    trackers: Trackers
    preemption: Preemption
    max_steps: int
    metadata: Mapping[str, str]
    """What the adapter's file says about this run."""
    resources: ExitStack
    """Run lock and signal handlers, held until the run ends."""
    page: RunPage = field(init=False)
    window: StepAccumulator = field(default_factory=StepAccumulator)
    stopping: bool = False
    skipped_steps: int = 0
    """Consecutive optimiser steps that the gradient scaler skipped."""

    def __post_init__(self) -> None:
        self.page = RunPage(self.config.checkpoint.output_dir, self.accelerator.is_main_process)

    def run(self) -> int:
        """Train from where the state stands to the last step.

        Returns:
            The exit code: 0 when finished, 75 when a signal ended it after a checkpoint.

        Raises:
            TrainingError: A loss or gradient is not finite.
            CheckpointError: A checkpoint cannot be written.
            StorageError: The same, for lack of space or permission.
        """
        with self.resources:
            self.trackers.start()
            self.resources.callback(self.trackers.finish)
            try:
                self._live()
            except SimpleTunerError:
                self.page.write("failed")
                raise
            if self.stopping:
                self.page.write("stopped")
            return EXIT_PREEMPTED if self.stopping else 0

    def close(self) -> None:
        """Give back what a trainer holds that will not run."""
        self.resources.close()

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress

    @property
    def is_sharded(self) -> bool:
        """Whether the adapter is shared out over the processes (FSDP)."""
        return any(is_dtensor(parameter) for parameter in self.adapter.parameters())

    @property
    def global_batch(self) -> int:
        """Samples in one micro-batch of all processes."""
        num_processes: int = self.accelerator.num_processes
        return num_processes * self.config.training.train_batch_size

    def state_digest(self) -> str:
        """SHA-256 of everything that must survive a restart."""
        return self.state.digest()

    def train_step(self, batch: Batch) -> MicroBatchOutput:
        """Forward and backward of one micro-batch; gradients are applied by the caller."""
        seed = self.config.training.seed
        # Dropout takes no generator, so the global one is set anew: a resumed run draws the same.
        torch.manual_seed(mix(seed, "dropout", batch.sample_indices[0]))
        noised = self.family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=seed)
        with self.adapter.rank_mask_for(
            noised.timesteps
        ):  # through backward: checkpointing re-runs the forward
            prediction = self.family.predict(self.denoiser, noised, batch)
            sample_losses = weighted_mse(prediction, noised.target, noised.weight)  # [B]
            loss = sample_losses.mean()
            self.accelerator.backward(loss)
        active_rank = self.adapter.mean_active_rank(noised.timesteps)
        stats = MicroBatchOutput(
            loss=loss.detach(),
            sample_losses=sample_losses.detach(),
            samples=len(batch),
            timesteps=noised.timesteps,
            active_rank=active_rank,
        )
        self.window.add(batch, stats)
        return stats

    def apply_gradients(self) -> Measured:
        """Clip the gathered gradients and take one optimiser step.

        Raises:
            TrainingError: A loss or the gradient is not finite; no step is taken.
        """
        measured = self.window.measure(
            self.accelerator,
            grad_norm=self._clip(),
            stop=self.preemption.requested,
            step=self.progress.step + 1,
        )
        self.optimizer.step()
        self._count_skipped(measured.grad_norm)
        self.lr_schedule.step()
        self.optimizer.zero_grad()
        return measured

    def save_checkpoint(self) -> Path:
        """Publish a checkpoint of the current step; every process takes part."""
        path = self.checkpoints.path(self.progress.step)
        is_main = self.accelerator.is_main_process
        if is_main or self.is_sharded:
            self.checkpoints.save(self.progress.step, write=self._write_state, publish=is_main)
        self.accelerator.wait_for_everyone()
        return path

    def _live(self) -> None:
        self.page.begin(self)
        self.validation.start(self.progress.step)
        with self._display() as display:
            self._train(display)
        if not self.stopping:
            self._finish()

    def _train(self, display: ProgressDisplay) -> None:
        first = self.progress.micro_step(global_batch=self.global_batch)
        batches = (to_device(batch, self.accelerator.device) for batch in self.data.batches(start=first))
        began_s = time.perf_counter()
        self._heed_signals()
        for batch in takewhile(lambda _: self._goes_on(), batches):
            # The denoiser as prepared: accelerate looks for no_sync on it.
            with self.accelerator.accumulate(self.denoiser):
                self.train_step(batch)
                if not self.accelerator.sync_gradients:
                    continue
                lr = float(self.lr_schedule.get_last_lr()[0])
                measured = self.apply_gradients()
            record = self._advance(measured, lr=lr, seconds=time.perf_counter() - began_s)
            display.update(record)
            self._run_due(record, agreed_to_stop=measured.stop)
            began_s = time.perf_counter()

    def _goes_on(self) -> bool:
        return not self.stopping and self.progress.step < self.max_steps

    def _advance(self, measured: Measured, *, lr: float, seconds: float) -> StepMetrics:
        samples = sum(stats.samples for stats in self.window.stats) * self.accelerator.num_processes
        self.window.clear()
        self.progress.advance(samples=samples)
        return StepMetrics(
            step=self.progress.step,
            epoch=(self.progress.samples - 1) // (self.global_batch * self.data.batches_per_epoch),
            loss=measured.loss,
            lr=lr,
            grad_norm=measured.grad_norm if math.isfinite(measured.grad_norm) else None,
            mean_active_rank=measured.active_rank,
            samples=self.progress.samples,
            seconds=seconds,
            loss_by_band=measured.loss_by_band,
            memory_mib=peak_memory_mib(),
            device_memory_mib=peak_device_memory_mib(self.accelerator.device),
        )

    def _run_due(self, record: StepMetrics, *, agreed_to_stop: bool) -> None:
        """Log, save and validate, in that order, whatever the step asks for; then stop if a signal came."""
        self.trackers.log(record)
        self.stopping = agreed_to_stop
        if self.stopping or self.checkpoints.is_due(record.step):
            self.save_checkpoint()
        if not self.stopping and record.step < self.max_steps and self.validation.is_due(record.step):
            self.validation.run(record.step)
        if self.checkpoints.is_due(record.step) or self.validation.is_due(record.step):
            self.page.refresh()
        self._heed_signals()

    def _heed_signals(self) -> None:
        """Stop at a signal that came since the last step; several processes agree on it in the next one."""
        if self.accelerator.num_processes == 1 and self.preemption.requested and not self.stopping:
            self.stopping = True
            if self.progress.step > 0:
                self.save_checkpoint()

    def _clip(self) -> Tensor:
        """Bound the gradients; their norm before that, a scalar."""
        parameters, bound = self.adapter.parameters(), self.config.training.max_grad_norm
        if self.config.training.grad_clip_method == "norm":
            return full_tensor(self.accelerator.clip_grad_norm_(parameters, bound or float("inf")))
        self.accelerator.unscale_gradients()
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if bound:
            torch.nn.utils.clip_grad_value_(parameters, bound)
        return norm

    def _count_skipped(self, grad_norm: float) -> None:
        # A fused optimiser skips inside its kernel, so that accelerate's step_was_skipped says no.
        self.skipped_steps = 0 if math.isfinite(grad_norm) else self.skipped_steps + 1
        if self.skipped_steps > MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"Step {self.progress.step + 1}: fp16 gradients overflowed {self.skipped_steps} times in a "
                "row. Use mixed_precision bf16, or lower learning_rate."
            )

    def _write_state(self, folder: Path) -> None:
        self.state.save(folder)
        self._save_adapter(folder / ADAPTER_FILE)

    def _save_adapter(self, file: Path) -> None:
        self.adapter.save(file, metadata={**self.metadata, "steps": str(self.progress.step)})

    @property
    def _wants_comfyui(self) -> bool:
        return self.config.adapter.lora_format == "comfyui"

    def _export(self, folder: Path) -> None:
        if self._wants_comfyui:
            spec, options = self.family.spec, ExportOptions(layout="comfyui")
            families = {spec.name: spec}
            export_adapter(folder / ADAPTER_FILE, folder / COMFYUI_FILE, options, families=families)

    def _finish(self) -> None:
        """The last checkpoint, the adapter, the last pictures, and where all of it lies."""
        step, output_dir = self.progress.step, self.config.checkpoint.output_dir
        checkpoint = self.save_checkpoint()
        if self.accelerator.is_main_process:
            self._save_adapter(output_dir / ADAPTER_FILE)
            self._export(output_dir)
        elif self.is_sharded:
            with TemporaryDirectory() as scratch:  # every process takes part in putting the adapter together
                self._save_adapter(Path(scratch) / ADAPTER_FILE)
        self.validation.run(step, "final")
        if self.preemption.requested:
            self.stopping = True
        elif self.accelerator.is_main_process:
            grid, page = self.validation.grid_file(step), self.page.write("finished")
            report = Report(
                step=step,
                adapter=str(output_dir / ADAPTER_FILE),
                checkpoint=str(checkpoint),
                metrics=str(output_dir / METRICS_FILE),
                config=str(output_dir / CONFIG_FILE),
                grid=str(grid) if grid.exists() else None,
                comfyui=str(output_dir / COMFYUI_FILE) if self._wants_comfyui else None,
                page=None if page is None else str(page),
            )
            report.save(output_dir)
            logger.info("Finished %d steps.", step)
            report.show()

    def _display(self) -> ProgressDisplay:
        return ProgressDisplay(
            total_steps=self.max_steps, step=self.progress.step, enabled=self.accelerator.is_main_process
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return replace(batch, latents=batch.latents.to(device), text=batch.text.to(device))

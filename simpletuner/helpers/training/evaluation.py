"""The loss of held-out images while a run trains, beside that of as many training images.

Shapes: N images, the held-out ones first, K noise levels of each, B samples of a forward pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from simpletuner.helpers.checkpointing.intervals import Epochs
from simpletuner.helpers.contracts import Batch, TextEmbeds
from simpletuner.helpers.data.held_out import chosen_to_evaluate
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.errors import CacheEntryError, DataError
from simpletuner.helpers.randomness import mix
from simpletuner.helpers.reporting.evaluations import EvaluationMetrics, evaluated_steps
from simpletuner.helpers.reporting.noise_bands import BANDS, band_of
from simpletuner.helpers.training.accelerator import in_any_process
from simpletuner.helpers.training.text_encoding import evaluating

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.configuration.schema.evaluation import EvaluationConfig
    from simpletuner.helpers.data.cache_reader import CachedItem
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.data.planned import PlannedImage
    from simpletuner.helpers.reporting.trackers import Trackers
    from simpletuner.helpers.training.objective import Objective
    from simpletuner.helpers.training.text_encoding import TextEncoding

logger = logging.getLogger(__name__)

Job = tuple[int, tuple[int, ...]]
"""Index of an image and the numbers of some of its noise levels: the samples of a forward pass."""


@dataclass(kw_only=True)
class Evaluation:
    """Measures the loss of fixed images at fixed noise levels, with a fixed noise for each.

    All of it depends on the seed and the image alone, and no random state of training is touched. The
    processes share the work; each makes as many forward passes as the others, as sharded weights need.
    """

    config: EvaluationConfig
    accelerator: Accelerator
    denoiser: nn.Module
    """As accelerate prepared it, the adapter inside."""
    trainable: Trainable
    objective: Objective
    text_encoding: TextEncoding
    data: TrainingData
    trackers: Trackers
    preemption: Preemption
    output_dir: Path
    weights: Callable[[], AbstractContextManager[None]]
    """The context in which the trained weights are those that are evaluated."""
    epochs: Epochs = field(default_factory=Epochs)
    """Where epochs end, for eval_epoch_interval."""
    _images: list[PlannedImage] = field(init=False)
    _num_held_out: int = field(init=False)
    _evaluated: set[int] = field(init=False, default_factory=set)
    """Optimiser steps that need no evaluation any more."""
    _reported: set[str] = field(init=False, default_factory=set)
    """Problems of images that were logged."""

    def __post_init__(self) -> None:
        held_out, trained = chosen_to_evaluate(
            self.data.divided, most=self.config.num_eval_images, dataset_ids=self.config.eval_dataset_id
        )
        self._images, self._num_held_out = [*held_out, *trained], len(held_out)

    @property
    def is_enabled(self) -> bool:
        """Whether there is something to evaluate."""
        return self._num_held_out > 0 and not self.config.eval_loss_disable

    def is_due(self, step: int) -> bool:
        """Whether an interval asks for an evaluation after this optimiser step."""
        steps, epochs = self.config.eval_steps_interval, self.config.eval_epoch_interval
        return self.is_enabled and self.epochs.is_due(step, steps=steps, epochs=epochs)

    def start(self, step: int) -> None:
        """Before step 1: evaluate the base model, and repeat an evaluation that was interrupted."""
        if not self.is_enabled:
            return
        # Only the main process sees the log, and all must do the same.
        known = [evaluated_steps(self.output_dir) if self.accelerator.is_main_process else set()]
        broadcast_object_list(known)
        self._evaluated = known[0]
        if step == 0 or self.is_due(step):
            self.run(step)

    def run(self, step: int) -> None:
        """Evaluate the present weights, unless it was done at this step; every process takes part."""
        if not self.is_enabled or step in self._evaluated:
            return
        started_s = time.perf_counter()
        models = [self.denoiser, *self.text_encoding.models]
        with torch.no_grad(), self.weights(), evaluating(models):
            measured = self._measured()
        if measured is None:
            logger.info("Interrupted: the evaluation of step %d will be made on resume.", step)
            return
        self._evaluated.add(step)
        losses, timesteps = measured
        bad = [image.sample.path for image, row in zip(self._images, losses, strict=True) if _is_bad(row)]
        if bad:
            text = "Evaluation of step %d: left out, without a finite loss: %s."
            logger.warning(text, step, listed(bad))
        metrics = summarised(
            losses,
            timesteps,
            num_held_out=self._num_held_out,
            image_set=self._image_set(losses),
            step=step,
            seconds=time.perf_counter() - started_s,
        )
        self.trackers.log_evaluation(metrics)
        logger.info(
            "Evaluation of step %d: loss %s held out, %s of training images, in %.1f s.",
            step,
            _shown(metrics.eval_loss),
            _shown(metrics.eval_train_loss),
            metrics.seconds,
        )

    def _measured(self) -> tuple[Tensor, Tensor] | None:
        """[N, K] losses, nan for an image with damaged cache entries, and timesteps; None if interrupted."""
        num_levels, device = self.config.eval_timesteps, self.accelerator.device
        measured = torch.zeros(2, len(self._images), num_levels, device=device)  # losses, timesteps
        for is_own, (index, numbers) in self._rounds():
            if in_any_process(self.accelerator, flag=self.preemption.requested):
                return None
            item, is_whole = self._item_or_next(index)
            losses, timesteps = self._sample_losses(self._images[index], item, numbers)
            if is_own:
                columns = torch.tensor(numbers, device=device)
                measured[0, index, columns] = losses.float() if is_whole else torch.nan
                measured[1, index, columns] = torch.tensor(timesteps, dtype=torch.float32, device=device)
        # Each element is 0 on all processes but one, so the sum is exact.
        total: Tensor = self.accelerator.reduce(measured, reduction="sum")
        losses, timesteps = total.cpu().double()
        return losses, timesteps

    def _rounds(self) -> Iterator[tuple[bool, Job]]:
        """This process's forward passes, and whether they count: all processes have equally many."""
        levels = range(self.config.eval_timesteps)
        sizes = [self.data.evaluated_batch_size(image) for image in self._images]
        jobs = [
            (index, tuple(levels[first : first + size]))
            for index, size in enumerate(sizes)
            for first in range(0, len(levels), size)
        ]
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        for first in range(0, len(jobs), num_processes):
            is_own = first + rank < len(jobs)
            yield is_own, jobs[first + rank] if is_own else jobs[-1]

    def _sample_losses(
        self, image: PlannedImage, item: CachedItem, numbers: Sequence[int]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """[B] losses of an image at some of its noise levels, and their timesteps."""
        size = len(numbers)
        batch = Batch(
            latents=torch.stack([item.latents] * size),
            text=TextEmbeds.stack([item.text] * size),
            samples=(item.sample,) * size,
            sample_indices=tuple(self._sample_index(image, number) for number in numbers),
            strength=self.data.evaluated_strength(image),
            loss_mask=None if item.loss_mask is None else torch.stack([item.loss_mask] * size),
            references=tuple(torch.stack([each] * size) for each in item.references),
        ).to(self.accelerator.device)
        shares = [(number + 0.5) / self.config.eval_timesteps for number in numbers]
        noisy = self.objective.evaluated_noise(batch, shares=shares)
        with self.trainable.rank_mask_for(noisy.timesteps), self.trainable.at_strength(batch.strength):
            batch = self.text_encoding.encoded(batch)
            prediction = self.objective.family.predict(self.denoiser, noisy, batch)
            return self.objective.sample_losses(prediction, noisy), noisy.timesteps

    def _sample_index(self, image: PlannedImage, number: int) -> int:
        """What stands for the index of a sample: an image at one of its noise levels has the same noise."""
        return mix(self.objective.seed, "evaluation", image.digest, number)

    def _image_set(self, losses: Tensor) -> int:
        """The number of the held-out images and captions that have losses; [N, K] losses."""
        held_out = zip(self._images[: self._num_held_out], losses, strict=False)
        kept = [image for image, row in held_out if not _is_bad(row)]
        facts = [fact for image in kept for fact in (image.digest, image.sample.caption)]
        return mix(self.config.eval_timesteps, "image set", *facts) % 2**53

    def _item_or_next(self, index: int) -> tuple[CachedItem, bool]:
        """The cached item of an image, or of the next one whose entries are whole; whether it is its own.

        Raises:
            DataError: No image's are.
        """
        problem = ""
        for offset in range(len(self._images)):
            image = self._images[(index + offset) % len(self._images)]
            try:
                item = self.data.evaluated_item(image, index=self._sample_index(image, 0))
            except CacheEntryError as error:
                problem = str(error)
                if problem not in self._reported:
                    logger.error("%s Until then it is not evaluated.", problem)
                self._reported.add(problem)
            else:
                return item, offset == 0
        raise DataError(f"No image that is evaluated has whole cache entries. {problem}")


def summarised(
    losses: Tensor, timesteps: Tensor, *, num_held_out: int, image_set: int, step: int, seconds: float
) -> EvaluationMetrics:
    """The mean losses of held-out and of training images, whole and by band; [N, K] losses and timesteps.

    An image without a finite loss at every noise level counts nowhere.
    """
    parts = [slice(num_held_out), slice(num_held_out, None)]
    kept = [[not _is_bad(row) for row in losses[part]] for part in parts]
    (held_out, levels), (trained, train_levels) = (
        (losses[part][keep], timesteps[part][keep]) for part, keep in zip(parts, kept, strict=True)
    )
    return EvaluationMetrics(
        step=step,
        eval_loss=_mean(held_out),
        eval_train_loss=_mean(trained),
        eval_loss_by_band=_by_band(held_out, levels),
        eval_train_loss_by_band=_by_band(trained, train_levels),
        images=len(held_out),
        image_set=image_set,
        train_images=len(trained),
        seconds=seconds,
    )


def _by_band(losses: Tensor, timesteps: Tensor) -> Mapping[str, float | None]:
    bands = torch.tensor([band_of(int(each)) for each in timesteps.flatten()], dtype=torch.int64)
    return {band: _mean(losses.flatten()[bands == index]) for index, band in enumerate(BANDS)}


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _is_bad(row: Tensor) -> bool:
    return not bool(row.isfinite().all())


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.5f}"

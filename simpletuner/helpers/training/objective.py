"""The objective of training: noise, target, weight and loss of a micro-batch.

Shapes: B batch, ... the axes of one sample's latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from simpletuner.helpers.models.noising import perturb
from simpletuner.helpers.training.losses import build_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from simpletuner.helpers.checkpointing.progress import Progress
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import Batch, NoisyBatch
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.training.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the denoiser learns.

    All randomness depends on the seed and each sample's index only; input_perturbation also depends on the
    optimiser step, which a checkpoint keeps.
    """

    family: ModelFamily
    loss: Loss
    noise: NoiseConfig
    seed: int
    progress: Progress

    def add_noise(self, batch: Batch) -> NoisyBatch:
        """Noise the latents of a micro-batch, with target and weight of each sample."""
        indices = batch.sample_indices
        noisy = self.family.add_noise(batch.latents, sample_indices=indices, seed=self.seed)
        noisy = replace(noisy, loss_mask=batch.loss_mask)
        strength = perturbation_strength(self.noise, step=self.progress.step)
        if not strength:
            return noisy
        return perturb(noisy, strength=strength, sample_indices=indices, seed=self.seed)

    def evaluated_noise(self, batch: Batch, *, shares: Sequence[float]) -> NoisyBatch:
        """Noise the latents at these quantiles of training's noise levels; without input_perturbation."""
        noisy = self.family.add_noise(
            batch.latents, sample_indices=batch.sample_indices, seed=self.seed, shares=shares
        )
        return replace(noisy, loss_mask=batch.loss_mask)

    def sample_losses(self, prediction: Tensor, noisy: NoisyBatch) -> Tensor:
        """Weighted loss of each sample, [B], of a prediction [B, ...] in the space of the target."""
        return self.loss(prediction, noisy)


def perturbation_strength(noise: NoiseConfig, *, step: int) -> float:
    """input_perturbation after this many optimiser steps; it falls to 0 over input_perturbation_steps."""
    steps = noise.input_perturbation_steps
    return noise.input_perturbation * (max(0.0, 1 - step / steps) if steps else 1.0)


def build_objective(config: RunConfig, family: ModelFamily, progress: Progress) -> Objective:
    """The configured objective."""
    return Objective(
        family=family,
        loss=build_loss(config.noise, num_timesteps=family.spec.num_train_timesteps),
        noise=config.noise,
        seed=config.training.seed,
        progress=progress,
    )

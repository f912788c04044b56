"""The objective of training: noise, target, weight and loss of a micro-batch.

Shapes: B batch, ... the axes of one sample's latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.helpers.training.losses import build_loss

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import Batch, NoisyBatch
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.training.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the denoiser learns. All randomness depends on the seed and each sample's index only."""

    family: ModelFamily
    loss: Loss
    seed: int

    def add_noise(self, batch: Batch) -> NoisyBatch:
        """Noise the latents of a micro-batch, with target and weight of each sample."""
        return self.family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=self.seed)

    def sample_losses(self, prediction: Tensor, noisy: NoisyBatch) -> Tensor:
        """Weighted loss of each sample, [B], of a prediction [B, ...] in the space of the target."""
        return self.loss(prediction, noisy.target, noisy.weight)


def build_objective(config: RunConfig, family: ModelFamily) -> Objective:
    """The configured objective."""
    return Objective(family=family, loss=build_loss(config.training), seed=config.training.seed)

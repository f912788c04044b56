"""Training timesteps in proportion to weights: the control for a rank schedule.

Shapes: B batch, T training timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.models.diffusion import v_target
from simpletuner.helpers.models.family import FamilyContext
from simpletuner.helpers.models.noising import Level, draw_noise, generator_of, mix_noise
from simpletuner.helpers.models.schedulers import training_alpha_bars
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.training.trainer import Trainer


class WeightedTimesteps(SDXL):
    """The embedded model's family, with training timesteps drawn in proportion to [T] weights."""

    def __init__(self, context: FamilyContext, *, weights: Sequence[int]) -> None:
        super().__init__(context)
        self._up_to: NDArray[np.int64] = np.cumsum(weights)
        self._alpha_bars = training_alpha_bars(self.components.scheduler, zero_snr=False)

    def add_noise(
        self,
        latents: Tensor,
        *,
        sample_indices: Sequence[int],
        seed: int,
        shares: Sequence[float] | None = None,
    ) -> NoisyBatch:
        """Noise [B, 4, h, w] latents for v-prediction; with equal weights it is the family's own noise."""
        if shares is None:
            generators = (generator_of(seed, "timestep", each) for each in sample_indices)
            timesteps = [draw_timestep(self._up_to, generator=each) for each in generators]
        else:
            sums = np.array(shares) * self._up_to[-1]
            timesteps = np.searchsorted(self._up_to, sums, side="right").tolist()
        alpha_bar = self._alpha_bars[timesteps]  # [B]
        scales = zip(alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), strict=True)
        levels = [Level(timestep, *pair) for timestep, pair in zip(timesteps, scales, strict=True)]
        noise = draw_noise(sample_indices, seed=seed, shape=latents.shape[1:])
        return mix_noise(latents, noise, levels, target=v_target)


def draw_timestep(up_to: NDArray[np.int64], *, generator: torch.Generator) -> int:
    """Draw a timestep in proportion to its weight, from the [T] sums of the weights up to each timestep."""
    drawn = int(torch.randint(int(up_to[-1]), (1,), generator=generator))
    return int(np.searchsorted(up_to, drawn, side="right"))


def with_weighted_timesteps(trainer: Trainer, weights: Sequence[int]) -> Trainer:
    """A trainer on the CPU whose timesteps are drawn in proportion to [T] weights."""
    config, family = trainer.config, trainer.family
    context = FamilyContext(
        model=config.model,
        noise=config.noise,
        precision=config.precision,
        device=family.device,
        weight_dtype=family.weight_dtype,
    )
    weighted = WeightedTimesteps(context, weights=weights)
    return replace(trainer, family=weighted, objective=replace(trainer.objective, family=weighted))

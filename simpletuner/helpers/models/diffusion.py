"""Diffusion: timestep, noise, target and loss weight of each sample.

Shapes: B batch, ... the axes of one sample's latents (of any number), T training timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.randomness import mix

DiffusionPrediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, slots=True)
class DiffusionSchedule:
    """Noise schedule, prediction type and loss weighting of a variance-preserving diffusion model."""

    alpha_bars: Tensor
    """[T] float32 in [0, 1]: share of the signal's variance at each timestep."""
    prediction: DiffusionPrediction
    snr_gamma: float | None = None
    """Signal-to-noise ratio above which the loss of a sample is scaled down. None: all weights are 1."""


def add_noise(
    latents: Tensor, *, schedule: DiffusionSchedule, sample_indices: Sequence[int], seed: int
) -> NoisyBatch:
    """Noise [B, ...] latents at a timestep drawn for each sample; float32, on the device of the latents.

    Timestep and noise depend on the seed and the sample index only, not on the batch or the process.
    """
    assert len(sample_indices) == len(latents), (
        f"{len(sample_indices)} sample indices for {len(latents)} samples"
    )
    clean = latents.float()
    timesteps = draw_timesteps(sample_indices, seed=seed, num_timesteps=len(schedule.alpha_bars))
    noise = draw_noise(sample_indices, seed=seed, shape=clean.shape[1:]).to(clean.device)
    alpha_bar = schedule.alpha_bars[list(timesteps)].float()  # [B]
    weight = loss_weight(alpha_bar, prediction=schedule.prediction, snr_gamma=schedule.snr_gamma)
    alpha_bar = per_sample(alpha_bar.to(clean.device), clean)
    return NoisyBatch(
        latents=q_sample(clean, noise, alpha_bar=alpha_bar),
        target=noise if schedule.prediction == "epsilon" else velocity(clean, noise, alpha_bar=alpha_bar),
        timesteps=timesteps,
        weight=weight.to(clean.device),
    )


def draw_timesteps(sample_indices: Sequence[int], *, seed: int, num_timesteps: int) -> tuple[int, ...]:
    """One uniform timestep in [0, num_timesteps) for each sample index."""
    return tuple(
        int(torch.randint(num_timesteps, (1,), generator=generator_of(seed, "timestep", sample_index)))
        for sample_index in sample_indices
    )


def draw_noise(sample_indices: Sequence[int], *, seed: int, shape: Sequence[int]) -> Tensor:
    """[B, *shape] float32 standard normal noise on the CPU, from an independent stream per sample index."""
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=generator_of(seed, "noise", sample_index))
            for sample_index in sample_indices
        ]
    )


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] values to [B, 1, ..., 1] with as many axes as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def q_sample(clean: Tensor, noise: Tensor, *, alpha_bar: Tensor) -> Tensor:
    """Noisy sample at the timestep whose signal variance is alpha_bar.

    Source: Ho et al., arXiv:2006.11239, equation 4.
    """
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def velocity(clean: Tensor, noise: Tensor, *, alpha_bar: Tensor) -> Tensor:
    """The v-prediction target. Source: Salimans and Ho, arXiv:2202.00512, section 4."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean


def loss_weight(alpha_bar: Tensor, *, prediction: DiffusionPrediction, snr_gamma: float | None) -> Tensor:
    """[B] weights of the squared error: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v.

    Without gamma every weight is 1. At snr 0 the weight is 1 (the limit) for epsilon and 0 for v.

    Source: Hang et al., arXiv:2303.09556, section 3.4.
    """
    if snr_gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    if prediction == "epsilon":
        return snr_gamma / snr.clamp(min=snr_gamma)
    return snr.clamp(max=snr_gamma) / (snr + 1)


def generator_of(seed: int, purpose: str, sample_index: int) -> torch.Generator:
    """Random generator for one purpose and sample index."""
    return torch.Generator().manual_seed(mix(seed, purpose, sample_index))

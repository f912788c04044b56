"""Diffusion noise: the timestep and noise of a sample, what the model should predict, what it weighs.

Shapes: B batch, C latent channels, H W latent height and width, T number of training timesteps.
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
    """What a variance-preserving diffusion model was trained with."""

    alpha_bars: Tensor
    """[T] float32 in [0, 1]: the share of the signal's variance that is left at each timestep."""
    prediction: DiffusionPrediction
    snr_gamma: float | None = None
    """Signal-to-noise ratio above which a sample's loss is scaled down. None weighs all samples alike."""


def add_noise(
    latents: Tensor, *, schedule: DiffusionSchedule, sample_indices: Sequence[int], seed: int
) -> NoisyBatch:
    """Noise [B, C, H, W] latents, each sample by the timestep and the noise that its position stands for.

    The result is float32 on the device of the latents. A sample's noise depends on the seed and its
    position only: neither on the other samples of its batch nor on the process that draws it.
    """
    assert len(sample_indices) == len(latents), (
        f"{len(sample_indices)} sample indices for {len(latents)} samples"
    )
    clean = latents.float()
    timesteps = draw_timesteps(sample_indices, seed=seed, num_timesteps=len(schedule.alpha_bars))
    noise = draw_noise(sample_indices, seed=seed, shape=clean.shape[1:]).to(clean.device)
    alpha_bar = schedule.alpha_bars[list(timesteps)].float()  # [B]
    weight = loss_weight(alpha_bar, prediction=schedule.prediction, snr_gamma=schedule.snr_gamma)
    alpha_bar = alpha_bar.to(clean.device)[:, None, None, None]  # [B, 1, 1, 1]
    return NoisyBatch(
        latents=q_sample(clean, noise, alpha_bar=alpha_bar),
        target=noise if schedule.prediction == "epsilon" else velocity(clean, noise, alpha_bar=alpha_bar),
        timesteps=timesteps,
        weight=weight.to(clean.device),
    )


def draw_timesteps(sample_indices: Sequence[int], *, seed: int, num_timesteps: int) -> tuple[int, ...]:
    """One timestep in [0, num_timesteps) for each position, uniform, known on the host."""
    return tuple(
        int(torch.randint(num_timesteps, (1,), generator=generator_of(seed, "timestep", position)))
        for position in sample_indices
    )


def draw_noise(sample_indices: Sequence[int], *, seed: int, shape: Sequence[int]) -> Tensor:
    """[B, *shape] float32 standard normal noise on the CPU, one independent stream for each position."""
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=generator_of(seed, "noise", position))
            for position in sample_indices
        ]
    )


def q_sample(clean: Tensor, noise: Tensor, *, alpha_bar: Tensor) -> Tensor:
    """The sample at the timestep whose remaining signal variance is alpha_bar.

    Source: Ho et al., arXiv:2006.11239, equation 4.
    """
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def velocity(clean: Tensor, noise: Tensor, *, alpha_bar: Tensor) -> Tensor:
    """The v-prediction target. Source: Salimans and Ho, arXiv:2202.00512, section 4."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean


def loss_weight(alpha_bar: Tensor, *, prediction: DiffusionPrediction, snr_gamma: float | None) -> Tensor:
    """[B] weights of the squared error: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v.

    Without gamma every weight is 1. At a signal-to-noise ratio of zero epsilon weighs 1, the limit, and v
    weighs 0.

    Source: Hang et al., arXiv:2303.09556, section 3.4.
    """
    if snr_gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    if prediction == "epsilon":
        return snr_gamma / snr.clamp(min=snr_gamma)
    return snr.clamp(max=snr_gamma) / (snr + 1)


def generator_of(seed: int, purpose: str, position: int) -> torch.Generator:
    """The stream of random numbers that one purpose draws from for one position."""
    return torch.Generator().manual_seed(mix(seed, purpose, position))

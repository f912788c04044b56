"""Flow matching: noise level (sigma) of each sample, its shift, and the target.

Shapes: B batch, ... the axes of one sample's latents (of any number).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.loading import Component, quiet
from simpletuner.helpers.models.noise_levels import SigmaDistribution, shift_sigma
from simpletuner.helpers.models.noise_levels import distribution_of as distribution_of
from simpletuner.helpers.models.noising import Level, draw_noise, generator_of, mix_noise
from simpletuner.helpers.models.shift import shift_at as shift_at  # families outside import it from here

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig
    from simpletuner.helpers.contracts import NoisyBatch

NUM_TRAIN_TIMESTEPS = 1000
SMALLEST_SHARE = 2.0**-54
"""In place of a drawn 0, of which a normal distribution has no quantile."""


def add_noise(
    latents: Tensor,
    *,
    distribution: SigmaDistribution,
    shift: float,
    sample_indices: Sequence[int],
    seed: int,
    shares: Sequence[float] | None = None,
) -> NoisyBatch:
    """Noise [B, ...] latents at a sigma drawn for each sample; float32, on the device of the latents.

    The target is the velocity from image to noise. Sigma and noise depend on the seed and the sample index
    only. With `shares`, in (0, 1), the sigmas are these quantiles of the distribution that they are drawn
    from, before the shift.

    Source: Lipman et al., arXiv:2210.02747; Liu et al., arXiv:2209.03003.
    """
    if shares is None:
        shares = [share_of(distribution, seed=seed, sample_index=each) for each in sample_indices]
    sigmas = tuple(float(np.float32(distribution.sigma_at(share, shift=shift))) for share in shares)
    levels = [Level(sigma_to_timestep(sigma), signal_scale=1 - sigma, noise_scale=sigma) for sigma in sigmas]
    noise = draw_noise(sample_indices, seed=seed, shape=latents.shape[1:])
    return replace(mix_noise(latents, noise, levels, target=velocity), sigmas=sigmas)


def velocity(clean: Tensor, noise: Tensor, *, signal_scale: Tensor, noise_scale: Tensor) -> Tensor:
    """The velocity from image to noise, the same at every noise level."""
    return noise - clean


def sample_sigma(distribution: SigmaDistribution, *, shift: float, seed: int, sample_index: int) -> float:
    """Sigma in [0, 1] of one sample index, after the shift, rounded to float32."""
    share = share_of(distribution, seed=seed, sample_index=sample_index)
    return float(np.float32(distribution.sigma_at(share, shift=shift)))


def share_of(distribution: SigmaDistribution, *, seed: int, sample_index: int) -> float:
    """The share in (0, 1) that stands for one sample index: drawn, or the next in turn."""
    if distribution.turns is not None:
        return (sample_index % distribution.turns + 0.5) / distribution.turns
    generator = generator_of(seed, "sigma", sample_index)
    return float(torch.rand((), generator=generator, dtype=torch.float64)) or SMALLEST_SHARE


def draw_guidance(noise: NoiseConfig, *, sample_indices: Sequence[int], seed: int) -> tuple[float, ...]:
    """Guidance scale of each sample in training."""
    if noise.flux_guidance_mode == "constant":
        return (noise.flux_guidance_value,) * len(sample_indices)
    low, high = noise.flux_guidance_min, noise.flux_guidance_max
    shares = (
        float(torch.rand((), generator=generator_of(seed, "guidance", each))) for each in sample_indices
    )
    return tuple(low + (high - low) * share for share in shares)


def sigma_to_timestep(sigma: float) -> int:
    """Timestep of a sigma: float32(sigma) * 1000 as the schedulers compute it, rounded down."""
    return int(np.float32(sigma) * np.float32(NUM_TRAIN_TIMESTEPS))


def timestep_input(sigmas: Sequence[float], *, dtype: torch.dtype) -> Tensor:
    """[B] timestep input of the transformer, sigma rounded to its dtype as pipelines do."""
    timesteps = torch.tensor(sigmas, dtype=torch.float32) * NUM_TRAIN_TIMESTEPS
    return timesteps.to(dtype) / NUM_TRAIN_TIMESTEPS


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """Sigma of each sampling step, from 1 down, with the same shift as in training."""
    sigmas = [shift_sigma(float(sigma), shift) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]
    return [float(np.float32(sigma)) for sigma in sigmas]


def unshifted_sampler(component: Component, *, name: str | None = None) -> SchedulerMixin:
    """The model's scheduler, or the named sampler, without a shift: pipeline calls pass shifted sigmas.

    Raises:
        ModelError: The sampler is not known for flow matching.
    """
    known = {key: each for key, each in SAMPLERS.items() if "flow_matching" in each.schedulers}
    name = name or "euler"
    if name not in known:
        raise ModelError(f"Sampler {name!r} is not known for flow matching. Use one of {', '.join(known)}.")
    sampler_class = known[name].load_for("flow_matching")
    with quiet():
        sampler: SchedulerMixin = sampler_class.from_config(
            dict(component.config), use_dynamic_shifting=False, shift=1.0
        )
    return sampler

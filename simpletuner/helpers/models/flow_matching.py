"""Flow matching: noise level (sigma) of each sample, its shift, and the target.

Shapes: B batch, ... the axes of one sample's latents (of any number).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from diffusers import SchedulerMixin
from scipy.special import betaincinv
from torch import Tensor

from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.diffusion import draw_noise, generator_of, per_sample
from simpletuner.helpers.models.loading import Component, quiet
from simpletuner.helpers.models.shift import shift_at as shift_at  # families outside import it from here

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import NoiseConfig

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, slots=True)
class SigmaDistribution:
    """Distribution of sigma before the shift."""

    name: Literal["sigmoid", "uniform", "beta"] = "sigmoid"
    scale: float = 1.0
    """sigma = sigmoid(scale * standard normal)."""
    alpha: float = 2.0
    beta: float = 2.0
    """Parameters of the beta distribution."""


def distribution_of(noise: NoiseConfig) -> SigmaDistribution:
    """Distribution of sigma that the configuration sets."""
    if noise.flow_use_uniform_schedule:
        return SigmaDistribution("uniform")
    if noise.flow_use_beta_schedule:
        return SigmaDistribution(
            "beta", alpha=noise.flow_beta_schedule_alpha, beta=noise.flow_beta_schedule_beta
        )
    return SigmaDistribution("sigmoid", scale=noise.flow_sigmoid_scale)


def add_noise(
    latents: Tensor,
    *,
    distribution: SigmaDistribution,
    shift: float,
    sample_indices: Sequence[int],
    seed: int,
) -> NoisyBatch:
    """Noise [B, ...] latents at a sigma drawn for each sample; float32, on the device of the latents.

    The target is the velocity from image to noise. Sigma and noise depend on the seed and the sample index
    only.

    Source: Lipman et al., arXiv:2210.02747; Liu et al., arXiv:2209.03003.
    """
    assert len(sample_indices) == len(latents), (
        f"{len(sample_indices)} sample indices for {len(latents)} samples"
    )
    clean = latents.float()
    noise = draw_noise(sample_indices, seed=seed, shape=clean.shape[1:]).to(clean.device)
    sigmas = tuple(
        shift_sigma(sample_sigma(distribution, seed=seed, sample_index=sample_index), shift)
        for sample_index in sample_indices
    )
    sigma = per_sample(torch.tensor(sigmas, dtype=torch.float32).to(clean.device), clean)
    return NoisyBatch(
        latents=(1 - sigma) * clean + sigma * noise,
        target=noise - clean,
        timesteps=tuple(map(sigma_to_timestep, sigmas)),
        weight=torch.ones(len(clean), device=clean.device),
        sigmas=sigmas,
    )


def sample_sigma(distribution: SigmaDistribution, *, seed: int, sample_index: int) -> float:
    """Sigma in [0, 1] of one sample index, before the shift."""
    generator = generator_of(seed, "sigma", sample_index)
    if distribution.name == "sigmoid":
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        return float(torch.sigmoid(distribution.scale * normal))
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    if distribution.name == "uniform":
        return uniform
    return float(betaincinv(distribution.alpha, distribution.beta, uniform))


def draw_guidance(noise: NoiseConfig, *, sample_indices: Sequence[int], seed: int) -> tuple[float, ...]:
    """Guidance scale of each sample in training."""
    if noise.flux_guidance_mode == "constant":
        return (noise.flux_guidance_value,) * len(sample_indices)
    low, high = noise.flux_guidance_min, noise.flux_guidance_max
    shares = (
        float(torch.rand((), generator=generator_of(seed, "guidance", each))) for each in sample_indices
    )
    return tuple(low + (high - low) * share for share in shares)


def shift_sigma(sigma: float, shift: float) -> float:
    """Sigma after the shift, rounded to float32.

    Source: Esser et al., arXiv:2403.03206, equation 23.
    """
    return float(np.float32(shift * sigma / (1 + (shift - 1) * sigma)))


def sigma_to_timestep(sigma: float) -> int:
    """Timestep of a sigma: float32(sigma) * 1000 as the schedulers compute it, rounded down."""
    return int(np.float32(sigma) * np.float32(NUM_TRAIN_TIMESTEPS))


def timestep_input(sigmas: Sequence[float], *, dtype: torch.dtype) -> Tensor:
    """[B] timestep input of the transformer, sigma rounded to its dtype as pipelines do."""
    timesteps = torch.tensor(sigmas, dtype=torch.float32) * NUM_TRAIN_TIMESTEPS
    return timesteps.to(dtype) / NUM_TRAIN_TIMESTEPS


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """Sigma of each sampling step, from 1 down, with the same shift as in training."""
    return [shift_sigma(float(sigma), shift) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]


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

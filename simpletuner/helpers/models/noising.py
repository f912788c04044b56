"""The steps that diffusion and flow matching share: draw noise, mix it in, make the target.

Shapes: B batch, ... the axes of one sample's latents (of any number).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.randomness import mix


class Target(Protocol):
    """What the denoiser should predict."""

    def __call__(self, clean: Tensor, noise: Tensor, *, signal_scale: Tensor, noise_scale: Tensor) -> Tensor:
        """[B, ...] target, of clean latents and noise [B, ...] and their factors [B, 1, ...]."""


@dataclass(frozen=True, slots=True)
class Level:
    """Noise level of one sample, in numbers on the host."""

    timestep: int
    signal_scale: float
    """Factor of the clean latents in the mixture."""
    noise_scale: float
    """Factor of the noise."""
    weight: float = 1.0
    """Of the loss."""


def draw_noise(sample_indices: Sequence[int], *, seed: int, shape: Sequence[int]) -> Tensor:
    """[B, *shape] float32 standard normal noise on the CPU, from an independent stream per sample index."""
    return torch.stack([standard_normal(shape, generator_of(seed, "noise", each)) for each in sample_indices])


def mix_noise(latents: Tensor, noise: Tensor, levels: Sequence[Level], *, target: Target) -> NoisyBatch:
    """Mix noise into latents, both [B, ...], at the level of each; float32, on the device of the latents."""
    assert len(noise) == len(latents), f"noise for {len(noise)} of {len(latents)} samples"
    clean = latents.float()
    noise = noise.to(clean.device)
    signal_scales = tuple(level.signal_scale for level in levels)
    noise_scales = tuple(level.noise_scale for level in levels)
    signal_scale, noise_scale = per_sample(signal_scales, clean), per_sample(noise_scales, clean)
    return NoisyBatch(
        latents=signal_scale * clean + noise_scale * noise,
        target=target(clean, noise, signal_scale=signal_scale, noise_scale=noise_scale),
        timesteps=tuple(level.timestep for level in levels),
        weight=torch.tensor([level.weight for level in levels]).to(clean.device),
        signal_scales=signal_scales,
        noise_scales=noise_scales,
    )


def perturb(noisy: NoisyBatch, *, strength: float, sample_indices: Sequence[int], seed: int) -> NoisyBatch:
    """The batch with further noise of this strength in its latents; the target stays.

    Source: Ning et al., arXiv:2301.11706, algorithm 1.
    """
    shape = noisy.latents.shape[1:]
    further = torch.stack(
        [standard_normal(shape, generator_of(seed, "perturbation", each)) for each in sample_indices]
    )
    scale = per_sample(noisy.noise_scales, noisy.latents)
    return replace(noisy, latents=noisy.latents + strength * scale * further.to(noisy.latents.device))


def per_sample(values: Sequence[float], like: Tensor) -> Tensor:
    """[B, 1, ..., 1] float32 of B numbers, with as many axes as `like`, on its device."""
    return torch.tensor(values, dtype=torch.float32).to(like.device).view(-1, *[1] * (like.ndim - 1))


def standard_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Float32 standard normal numbers on the CPU."""
    return torch.randn(tuple(shape), generator=generator)


def generator_of(seed: int, purpose: str, sample_index: int) -> torch.Generator:
    """Random generator for one purpose and sample index."""
    return torch.Generator().manual_seed(mix(seed, purpose, sample_index))

"""Diffusion: timestep, noise, target and loss weight of each sample.

Shapes: B batch, ... the axes of one sample's latents (of any number), C channels, h w height and width,
T training timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.noise_levels import timestep_weights
from simpletuner.helpers.models.noising import (
    Level,
    Target,
    draw_noise,
    generator_of,
    mix_noise,
    standard_normal,
)

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig
    from simpletuner.helpers.contracts import NoisyBatch

DiffusionPrediction = Literal["epsilon", "v_prediction"]
LARGEST_SNR = 1000.0
"""Bound of the signal-to-noise ratio in the debiased weights, as in kohya's scripts."""


@dataclass(frozen=True)
class DiffusionSchedule:
    """Noise schedule, prediction type and settings of a variance-preserving diffusion model.

    Raises:
        ModelError: debiased_estimation_loss would divide by no signal.
    """

    alpha_bars: Tensor
    """[T] float32 in [0, 1]: share of the signal's variance at each timestep."""
    prediction: DiffusionPrediction
    noise: NoiseConfig

    def __post_init__(self) -> None:
        if self.noise.debiased_estimation_loss and self.prediction == "epsilon" and not self.alpha_bars.all():
            raise ModelError(
                "debiased_estimation_loss: the last timestep of this model has no signal, and its weight "
                "would be infinite. Remove it, or set rescale_betas_zero_snr to false."
            )

    @cached_property
    def timestep_weights(self) -> Tensor:
        """[T]: how often each timestep is drawn, relative to others."""
        return torch.tensor(timestep_weights(self.noise, len(self.alpha_bars)))


def add_noise(
    latents: Tensor,
    *,
    schedule: DiffusionSchedule,
    sample_indices: Sequence[int],
    seed: int,
    shares: Sequence[float] | None = None,
) -> NoisyBatch:
    """Noise [B, ...] latents at a timestep drawn for each sample; float32, on the device of the latents.

    Timestep and noise depend on the seed and the sample index only, not on the batch or the process. With
    `shares`, in (0, 1), the timesteps are these quantiles of the distribution that they are drawn from.

    Source: Ho et al., arXiv:2006.11239, equation 4.
    """
    if shares is None:
        timesteps = draw_timesteps(sample_indices, seed=seed, weights=schedule.timestep_weights)
    else:
        timesteps = timesteps_at(shares, weights=schedule.timestep_weights)
    alpha_bar = schedule.alpha_bars[list(timesteps)].float()  # [B]
    weight = loss_weight(alpha_bar, prediction=schedule.prediction, noise=schedule.noise)
    columns = (alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), weight.tolist())
    levels = [Level(*level) for level in zip(timesteps, *columns, strict=True)]
    noise = draw_noise(sample_indices, seed=seed, shape=latents.shape[1:])
    if schedule.noise.offset_noise or schedule.noise.multires_noise_iterations:
        pairs = zip(noise, sample_indices, strict=True)
        noise = torch.stack([special_noise(*pair, settings=schedule.noise, seed=seed) for pair in pairs])
    return mix_noise(latents, noise, levels, target=TARGETS[schedule.prediction])


def draw_timesteps(sample_indices: Sequence[int], *, seed: int, weights: Tensor) -> tuple[int, ...]:
    """One timestep in [0, T) for each sample index, drawn in proportion to its weight [T]."""
    is_uniform = bool((weights == weights[0]).all())

    def draw(sample_index: int) -> int:
        generator = generator_of(seed, "timestep", sample_index)
        if is_uniform:
            return int(torch.randint(len(weights), (1,), generator=generator))
        return int(torch.multinomial(weights, 1, generator=generator))

    return tuple(map(draw, sample_indices))


def timesteps_at(shares: Sequence[float], *, weights: Tensor) -> tuple[int, ...]:
    """The timestep in [0, T) at each quantile in (0, 1) of their distribution by weight, [T]."""
    sums = weights.double().cumsum(0)
    wanted = torch.tensor(shares, dtype=torch.float64) * sums[-1]
    return tuple(torch.searchsorted(sums, wanted, right=True).tolist())


def special_noise(noise: Tensor, sample_index: int, *, settings: NoiseConfig, seed: int) -> Tensor:
    """The noise of one sample, [C, ...], with what the configuration adds: offset, then coarser noise."""
    if settings.offset_noise:
        generator = generator_of(seed, "offset noise", sample_index)
        if float(torch.rand((), generator=generator)) < settings.noise_offset_probability:
            noise = noise + settings.noise_offset * channel_offset(noise.shape, generator=generator)
    if settings.multires_noise_iterations:
        noise = add_coarse_noise(
            noise,
            iterations=settings.multires_noise_iterations,
            discount=settings.multires_noise_discount,
            generator=generator_of(seed, "multires noise", sample_index),
        )
    return noise


def channel_offset(shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """[C, 1, ...]: one standard normal number for each channel of [C, ...] latents.

    Source: N. Guttenberg, Diffusion with Offset Noise, crosslabs.org, 2023.
    """
    return standard_normal([shape[0], *[1] * (len(shape) - 1)], generator)


def add_coarse_noise(
    noise: Tensor, *, iterations: int, discount: float, generator: torch.Generator
) -> Tensor:
    """[C, ..., h, w] noise with enlarged coarser noise added, scaled to a standard deviation of 1.

    Iteration i adds discount**i times normal noise whose edges are r**i times shorter, with a new r in [2, 4)
    each, and the last one is the first that is 1 wide or high.

    Source: J. Whitaker, Multi-Resolution Noise for Diffusion Model Training, wandb.ai, 2023. It scales by the
    deviation of the batch; here that of the sample counts, so that a sample is the same in every batch.
    """
    assert noise.ndim >= 3, f"latents must be [C, ..., h, w], got {tuple(noise.shape)}"
    *leading, height, width = noise.shape
    for iteration in range(iterations):
        ratio = float(2 + 2 * torch.rand((), generator=generator)) ** iteration
        coarse_height, coarse_width = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = standard_normal([*leading, coarse_height, coarse_width], generator)
        enlarged = interpolate(coarse.flatten(0, -3)[None], size=(height, width), mode="bilinear")
        noise = noise + discount**iteration * enlarged.view_as(noise)
        if 1 in (coarse_height, coarse_width):
            break
    return noise / noise.std()


def epsilon(clean: Tensor, noise: Tensor, *, signal_scale: Tensor, noise_scale: Tensor) -> Tensor:
    """The noise. Source: Ho et al., arXiv:2006.11239, equation 14."""
    return noise


def v_target(clean: Tensor, noise: Tensor, *, signal_scale: Tensor, noise_scale: Tensor) -> Tensor:
    """The v-prediction target. Source: Salimans and Ho, arXiv:2202.00512, section 4."""
    return signal_scale * noise - noise_scale * clean


TARGETS: dict[DiffusionPrediction, Target] = {"epsilon": epsilon, "v_prediction": v_target}


def q_sample(clean: Tensor, noise: Tensor, *, alpha_bar: Tensor) -> Tensor:
    """Noisy sample at the timestep whose signal variance is alpha_bar.

    Source: Ho et al., arXiv:2006.11239, equation 4.
    """
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def velocity(clean: Tensor, noise: Tensor, *, alpha_bar: Tensor) -> Tensor:
    """The v-prediction target at the timestep whose signal variance is alpha_bar."""
    return v_target(clean, noise, signal_scale=alpha_bar.sqrt(), noise_scale=(1 - alpha_bar).sqrt())


def loss_weight(alpha_bar: Tensor, *, prediction: DiffusionPrediction, noise: NoiseConfig) -> Tensor:
    """[B] weights of the loss; the product of those that the configuration sets, else 1."""
    snr = alpha_bar / (1 - alpha_bar)
    weight = torch.ones_like(alpha_bar)
    if noise.snr_gamma is not None and noise.use_soft_min_snr:
        sigma_data = noise.soft_min_snr_sigma_data
        weight = soft_min_snr(snr, prediction=prediction, gamma=noise.snr_gamma, sigma_data=sigma_data)
    elif noise.snr_gamma is not None:
        weight = min_snr(snr, prediction=prediction, gamma=noise.snr_gamma)
    if noise.debiased_estimation_loss:
        weight = weight * debiased(snr, prediction=prediction)
    return weight


def min_snr(snr: Tensor, *, prediction: DiffusionPrediction, gamma: float) -> Tensor:
    """min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v.

    At snr 0 the weight is 1 (the limit) for epsilon and 0 for v.

    Source: Hang et al., arXiv:2303.09556, section 3.4.
    """
    if prediction == "epsilon":
        return gamma / snr.clamp(min=gamma)
    return snr.clamp(max=gamma) / (snr + 1)


def soft_min_snr(snr: Tensor, *, prediction: DiffusionPrediction, gamma: float, sigma_data: float) -> Tensor:
    """Gamma / (gamma + sigma_data² snr) for epsilon, that times snr / (snr + 1) for v.

    In the space of the clean latents it is 1 / (1 / snr + sigma_data² / gamma).

    Source: soft-min-SNR of Crowson et al., arXiv:2401.11605: 1 / (sigma² + 1 / gamma), where gamma is
    1 / sigma_data². Here both can be set; theirs is gamma 1, or sigma_data 1.
    """
    weight = gamma / (gamma + sigma_data**2 * snr)
    return weight if prediction == "epsilon" else weight * snr / (snr + 1)


def debiased(snr: Tensor, *, prediction: DiffusionPrediction) -> Tensor:
    """1 / sqrt(snr) for epsilon, 1 / (snr + 1) for v, with snr up to 1000.

    Source: Yu et al., arXiv:2310.08442, for epsilon; for v, and the bound, kohya's scripts.
    """
    snr = snr.clamp(max=LARGEST_SNR)
    return snr.rsqrt() if prediction == "epsilon" else 1 / (snr + 1)

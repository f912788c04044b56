"""Which noise levels training draws, and how often; drawing and forecast use the same. Imports no torch.

A share u in (0, 1), drawn uniformly, stands for one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from simpletuner.helpers.configuration.schema.base import NUM_TIMESTEPS
from simpletuner.helpers.configuration.schema.noise import biased_timesteps

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig

_NORMAL = NormalDist()


def timestep_weights(noise: NoiseConfig, num_timesteps: int) -> list[float]:
    """How often a diffusion run draws each timestep, relative to others: min_timestep, max_timestep, bias.

    Source of the bias: generate_timestep_weights of diffusers' script train_text_to_image_sdxl.py.
    """
    begin, end = biased_timesteps(noise, num_timesteps)
    weights = [0.0] * num_timesteps
    for timestep in range(noise.min_timestep, min(noise.max_timestep, num_timesteps)):
        weights[timestep] = noise.timestep_bias_multiplier if begin <= timestep < end else 1.0
    return weights


@dataclass(frozen=True, slots=True)
class SigmaDistribution:
    """Distribution of sigma in a flow-matching run."""

    quantile: Callable[[float], float]
    """Share -> sigma before the shift."""
    lowest: float = 0.0
    highest: float = 1.0
    """Sigma after the shift is spread over this range."""
    is_shifted: bool = True
    turns: int | None = None
    """Samples after which the levels repeat; None: they are drawn."""

    def sigma_at(self, share: float, *, shift: float) -> float:
        """Sigma of a share, after the shift."""
        sigma = self.quantile(share)
        if self.is_shifted:
            sigma = shift_sigma(sigma, shift)
        return self.lowest + (self.highest - self.lowest) * sigma


def shift_sigma(sigma: float, shift: float) -> float:
    """Sigma after the shift. Source: Esser et al., arXiv:2403.03206, equation 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def distribution_of(noise: NoiseConfig) -> SigmaDistribution:
    """Distribution of sigma that the configuration sets."""
    if noise.flow_custom_timesteps is not None:
        levels = noise.flow_custom_timesteps
        if max(levels) > 1:
            levels = tuple(level / NUM_TIMESTEPS for level in levels)
        turns = len(levels) if noise.flow_timesteps_mode == "round-robin" else None
        return SigmaDistribution(
            lambda share: levels[int(share * len(levels))], is_shifted=False, turns=turns
        )
    return SigmaDistribution(
        _quantile(noise),
        lowest=noise.min_timestep / NUM_TIMESTEPS,
        highest=noise.max_timestep / NUM_TIMESTEPS,
    )


def _quantile(noise: NoiseConfig) -> Callable[[float], float]:
    if noise.flow_use_uniform_schedule:
        return lambda share: share
    if noise.flow_use_beta_schedule:
        return beta(noise.flow_beta_schedule_alpha, noise.flow_beta_schedule_beta)
    if noise.flow_use_mode_schedule:
        return lambda share: mode(share, scale=noise.flow_mode_schedule_scale)
    if noise.flow_cubic_schedule_weights is not None:
        return cubic(noise.flow_cubic_schedule_weights)
    return lambda share: logit_normal(share, mean=noise.flow_sigmoid_mean, scale=noise.flow_sigmoid_scale)


def logit_normal(share: float, *, mean: float, scale: float) -> float:
    """Sigmoid of the quantile of a normal distribution.

    Source: Esser et al., arXiv:2403.03206, equation 19.
    """
    return (1 + math.tanh((mean + scale * _NORMAL.inv_cdf(share)) / 2)) / 2


def mode(share: float, *, scale: float) -> float:
    """Noise level of the distribution with heavy tails.

    Source: Esser et al., arXiv:2403.03206, equation 20. It falls as the share grows.
    """
    return 1 - share - scale * (math.cos(math.pi / 2 * share) ** 2 - 1 + share)


def beta(first: float, second: float) -> Callable[[float], float]:
    """Quantile function of the beta distribution with these parameters."""
    from scipy.special import betaincinv

    return lambda share: float(betaincinv(first, second, share))


def cubic(weights: Sequence[float]) -> Callable[[float], float]:
    """Quantile function of a density that runs monotonically from weight to weight, at equal distances.

    Source: Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5 (1984), as scipy's PchipInterpolator.
    """
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import brentq

    last = len(weights) - 1
    cumulative = PchipInterpolator([index / last for index in range(last + 1)], weights).antiderivative()
    total = float(cumulative(1.0))
    return lambda share: float(brentq(lambda sigma: float(cumulative(sigma)) - share * total, 0.0, 1.0))

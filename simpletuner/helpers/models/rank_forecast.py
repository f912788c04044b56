"""The mean active rank that a T-LoRA run will train with. Imports no torch.

It follows from rank schedule, noise levels and their shift, in plain floats on 2,000 points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from simpletuner.helpers.adapters.tlora.rank_schedule import LayerRanks, RankSchedule, min_rank_of
from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.models.shift import static_shift

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
    from simpletuner.helpers.configuration.schema.sections import NoiseConfig, RunConfig
    from simpletuner.helpers.contracts import ModelSpec, Size

NUM_POINTS = 2000
TOKEN_EDGE_PX = 16
LOW_SHARE = 0.25
"""Below this share of the rank most of the adapter is idle in most steps."""


@dataclass(frozen=True, slots=True)
class RankForecast:
    """Mean active ranks over training."""

    mean: float
    """Of layers with the adapter's own rank schedule."""
    entries: Mapping[str, tuple[float, int]]
    """Entry of module_algo_map or name_algo_map with a schedule of its own -> mean active rank, rank."""


def expected_mean_rank(
    config: RunConfig, spec: ModelSpec, *, scheduler: Mapping[str, object] | None, size: Size
) -> RankForecast | None:
    """Forecast of a run; None without a rank schedule, or while the shift is unknown.

    Args:
        config: The run.
        spec: Its family.
        scheduler: Configuration of the model's scheduler; None if it is not on this machine.
        size: Size of the training images, on which a dynamic shift depends.
    """
    lycoris = config.lycoris
    if lycoris is None or not ALGORITHMS[lycoris.algo].has_rank_schedule:
        return None
    num_timesteps = spec.num_train_timesteps
    schedule = RankSchedule.of_adapter(lycoris, num_timesteps=num_timesteps)
    if "flow_matching" not in spec.prediction_types:
        return _forecast(lycoris, schedule, dict.fromkeys(range(num_timesteps), 1.0))
    shift = _shift(config.noise, spec, scheduler=scheduler, size=size)
    if shift is None:
        return None
    weights: dict[int, float] = {}
    for sigma, weight in sigma_weights(config.noise):
        timestep = int(num_timesteps * shift * sigma / (1 + (shift - 1) * sigma))
        weights[timestep] = weights.get(timestep, 0.0) + weight
    return _forecast(lycoris, schedule, weights)


def is_low(forecast: RankForecast, lycoris: LycorisConfig) -> bool:
    """Whether most of the ranks are idle in most steps."""
    return forecast.mean < LOW_SHARE * lycoris.linear_dim


def sigma_weights(noise: NoiseConfig) -> list[tuple[float, float]]:
    """(sigma, weight) of NUM_POINTS points of the configured distribution, before the shift."""
    shares = [(index + 0.5) / NUM_POINTS for index in range(NUM_POINTS)]
    if noise.flow_use_uniform_schedule:
        return [(share, 1.0) for share in shares]
    if noise.flow_use_beta_schedule:
        a, b = noise.flow_beta_schedule_alpha - 1, noise.flow_beta_schedule_beta - 1
        return [(share, share**a * (1 - share) ** b) for share in shares]
    normal = NormalDist()
    return [(1 / (1 + math.exp(-noise.flow_sigmoid_scale * normal.inv_cdf(share))), 1.0) for share in shares]


def _forecast(lycoris: LycorisConfig, network: RankSchedule, weights: Mapping[int, float]) -> RankForecast:
    preset = lycoris.apply_preset
    entries: dict[str, tuple[float, int]] = {}
    for name, entry in (*preset.module_algo_map.items(), *preset.name_algo_map.items()):
        if entry.tlora_min_rank is None and entry.tlora_alpha is None:
            continue
        rank, share = entry.dim or network.max_rank, entry.tlora_min_rank or lycoris.tlora_min_rank
        layer = LayerRanks(rank, min_rank_of(share, rank), entry.tlora_alpha)
        entries[name] = _mean_rank(layer.schedule_in(network), weights), rank
    return RankForecast(_mean_rank(network, weights), entries)


def _mean_rank(schedule: RankSchedule, weights: Mapping[int, float]) -> float:
    ranks = {timestep: schedule.rank_at(timestep) for timestep in weights}
    return sum(ranks[each] * weight for each, weight in weights.items()) / sum(weights.values())


def _shift(
    noise: NoiseConfig, spec: ModelSpec, *, scheduler: Mapping[str, object] | None, size: Size
) -> float | None:
    if scheduler is None and (noise.flow_schedule_auto_shift or noise.flow_schedule_shift is None):
        return None
    fixed = static_shift(noise, scheduler or {})
    if fixed is not None or spec.dynamic_shift is None:
        return fixed
    num_tokens = size.height * size.width // TOKEN_EDGE_PX**2
    return spec.dynamic_shift(scheduler or {}, num_tokens)

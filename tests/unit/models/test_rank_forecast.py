"""The mean active rank that a run will train with, against hand-computed numbers and real draws."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from scipy.interpolate import PchipInterpolator

from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec, Size
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.diffusion import DiffusionSchedule, draw_timesteps
from simpletuner.helpers.models.flow_matching import (
    distribution_of,
    sample_sigma,
    sigma_to_timestep,
)
from simpletuner.helpers.models.flux2.spec import empirical_shift
from simpletuner.helpers.models.noise_levels import timestep_weights
from simpletuner.helpers.models.rank_forecast import RankForecast, expected_mean_rank, is_low

SQUARE = Size(height=1024, width=1024)


def run_of(folder: Path, family: str, *, rank: int = 32, **keys: Any) -> RunConfig:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images/a.png").touch()
    lycoris = {"algo": "tlora", "multiplier": 1.0, "linear_dim": rank, "linear_alpha": rank}
    lycoris |= {key: keys.pop(key) for key in list(keys) if key.startswith(("tlora_", "apply_"))}
    values = {
        "model_family": family,
        "lora_type": "lycoris",
        "lycoris_config": {"tlora_min_rank": 1, **lycoris},
        "data_backend_config": [{"id": "a", "instance_data_dir": str(folder / "images")}],
        **keys,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder / "config.json", families=registry.specs())


def mean_rank_of(config: RunConfig, spec: ModelSpec, **model: Any) -> float | None:
    forecast = expected_mean_rank(config, spec, **model)
    return None if forecast is None else forecast.mean


@pytest.mark.parametrize(
    ("lycoris", "mean"),
    [
        ({}, 10 / 4),
        ({"tlora_min_rank": 2}, (4 + 3 + 3 + 2) / 4),
        ({"tlora_min_rank": 0.5}, (4 + 3 + 3 + 2) / 4),
        ({"tlora_alpha": 2.0}, (4 + 2 + 1 + 1) / 4),
        ({"tlora_schedule": "inclusive"}, (4 + 4 + 3 + 2) / 4),
    ],
    ids=["defaults", "min_rank", "share", "alpha", "inclusive"],
)
def test_a_diffusion_run_draws_every_timestep_alike(
    tmp_path: Path, lycoris: dict[str, Any], mean: float
) -> None:
    # Of 4 timesteps: shares 1, 3/4, 2/4, 1/4 of the ranks above min_rank, rounded down.
    config = run_of(tmp_path, "sdxl", rank=4, **lycoris)
    spec = replace(registry.specs()["sdxl"], num_train_timesteps=4)
    assert mean_rank_of(config, spec, scheduler=None, size=SQUARE) == mean


@pytest.mark.parametrize(
    "keys",
    [
        {"flow_schedule_shift": 3.0},
        {"flow_schedule_shift": 1.0, "flow_use_uniform_schedule": True},
        {"flow_schedule_shift": 2.0, "flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3.0},
        {"flow_schedule_shift": 0},
        {"flow_schedule_shift": 3.0, "flow_sigmoid_scale": 3.0},
        {"flow_schedule_shift": 3.0, "flow_sigmoid_mean": -1.5},
        {"flow_schedule_shift": 2.0, "flow_use_mode_schedule": True},
        {"flow_schedule_shift": 2.0, "flow_cubic_schedule_weights": [4, 1, 2, 0]},
        {"flow_schedule_shift": 2.0, "flow_custom_timesteps": [0.1, 0.2, 0.9]},
        {"flow_schedule_shift": 3.0, "min_timestep": 100, "max_timestep": 500},
    ],
    ids=str,
)
def test_a_flow_run_is_forecast_as_it_draws(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = run_of(tmp_path, "flux", **keys)
    mean = mean_rank_of(config, registry.specs()["flux"], scheduler=None, size=SQUARE)
    schedule, distribution = RankSchedule(max_rank=32), distribution_of(config.noise)
    shift = keys["flow_schedule_shift"] or 1.0
    drawn = [sample_sigma(distribution, shift=shift, seed=1, sample_index=index) for index in range(3000)]
    ranks = [schedule.rank_at(sigma_to_timestep(sigma)) for sigma in drawn]
    assert mean == pytest.approx(fmean(ranks), abs=0.5)


@pytest.mark.parametrize(
    "keys",
    [
        {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 5.0},
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 5.0, "timestep_bias_portion": 0.5},
        {
            "timestep_bias_strategy": "range",
            "timestep_bias_multiplier": 20.0,
            "timestep_bias_begin": 100,
            "timestep_bias_end": 300,
        },
        {"min_timestep": 600},
        {"max_timestep": 300},
    ],
    ids=str,
)
def test_a_diffusion_run_is_forecast_as_it_draws(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = run_of(tmp_path, "sdxl", **keys)
    mean = mean_rank_of(config, registry.specs()["sdxl"], scheduler=None, size=SQUARE)
    noise_schedule = DiffusionSchedule(torch.full((1000,), 0.5), prediction="epsilon", noise=config.noise)
    drawn = draw_timesteps(range(2000), seed=1, weights=noise_schedule.timestep_weights)
    schedule = RankSchedule(max_rank=32)
    assert mean == pytest.approx(fmean(map(schedule.rank_at, drawn)), abs=0.6)
    plain = mean_rank_of(run_of(tmp_path, "sdxl"), registry.specs()["sdxl"], scheduler=None, size=SQUARE)
    assert mean is not None
    assert plain is not None
    assert abs(mean - plain) > 2, "the keys have no effect"


@pytest.mark.parametrize(
    ("keys", "weights"),
    [
        ({}, [1, 1, 1, 1]),
        ({"timestep_bias_strategy": "earlier"}, [3, 1, 1, 1]),
        ({"timestep_bias_strategy": "later"}, [1, 1, 1, 3]),
        ({"timestep_bias_strategy": "later", "timestep_bias_portion": 0.5}, [1, 1, 3, 3]),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 1, "timestep_bias_end": 3},
            [1, 3, 3, 1],
        ),
        ({"min_timestep": 1, "max_timestep": 3}, [0, 1, 1, 0]),
        ({"timestep_bias_strategy": "earlier", "max_timestep": 2}, [3, 1, 0, 0]),
    ],
    ids=str,
)
def test_timestep_weights_match_hand_computed_values(keys: dict[str, Any], weights: list[float]) -> None:
    assert timestep_weights(NoiseConfig(timestep_bias_multiplier=3, **keys), 4) == weights


@pytest.mark.parametrize(
    ("keys", "sigmas"),
    [
        # At the shares 1/4, 1/2, 3/4. The normal distribution's quantiles are -0.67449, 0, 0.67449.
        ({}, (0.33749, 0.5, 0.66251)),
        ({"flow_sigmoid_mean": 1.0, "flow_sigmoid_scale": 2.0}, (0.41362, 0.73106, 0.91286)),
        ({"flow_use_uniform_schedule": True}, (0.25, 0.5, 0.75)),
        # 1 - u - s (cos²(pi u / 2) - 1 + u), cos² being 0.85355, 0.5, 0.14645: 0.75 - 0.10355 s at 1/4.
        ({"flow_use_mode_schedule": True}, (0.61641, 0.5, 0.38359)),
        ({"flow_use_mode_schedule": True, "flow_mode_schedule_scale": -1}, (0.85355, 0.5, 0.14645)),
        # Density 2s: the share below s is s².
        ({"flow_cubic_schedule_weights": [0, 1]}, (0.5, 0.70711, 0.86603)),
        ({"flow_cubic_schedule_weights": [1, 1, 1]}, (0.25, 0.5, 0.75)),
        # Density 1 - s: 1 - (1 - s)² of the shares lie below s.
        ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 1}, (0.13397, 0.29289, 0.5)),
        ({"flow_custom_timesteps": [0.9, 0.1]}, (0.9, 0.1, 0.1)),
        ({"flow_use_uniform_schedule": True, "max_timestep": 500}, (0.125, 0.25, 0.375)),
    ],
    ids=str,
)
def test_noise_levels_match_hand_computed_values(keys: dict[str, Any], sigmas: tuple[float, ...]) -> None:
    distribution = distribution_of(NoiseConfig(**keys))
    found = [distribution.sigma_at(share, shift=1.0) for share in (0.25, 0.5, 0.75)]
    assert found == pytest.approx(sigmas, abs=1e-5)


def test_a_density_of_three_weights_is_cubic_between_them() -> None:
    # The density is symmetric, so half of the draws lie below 0.5.
    distribution = distribution_of(NoiseConfig(flow_cubic_schedule_weights=(0, 1, 0)))
    low, middle, high = (distribution.sigma_at(share, shift=1.0) for share in (0.1, 0.5, 0.9))
    assert middle == pytest.approx(0.5)
    assert low + high == pytest.approx(1)
    density = PchipInterpolator([0, 0.5, 1], [0, 1, 0])
    assert density.integrate(0, low) == pytest.approx(0.1 * density.integrate(0, 1))


def test_a_dynamic_shift_follows_the_models_scheduler_and_the_size(tmp_path: Path) -> None:
    config, spec = run_of(tmp_path, "flux"), registry.specs()["flux"]
    dynamic = {"use_dynamic_shifting": True}
    assert mean_rank_of(config, spec, scheduler=None, size=SQUARE) is None
    small = mean_rank_of(config, spec, scheduler=dynamic, size=Size(height=256, width=256))
    large = mean_rank_of(config, spec, scheduler=dynamic, size=SQUARE)
    static = mean_rank_of(config, spec, scheduler={"shift": 1.0}, size=SQUARE)
    assert large is not None
    assert small is not None
    assert static is not None
    assert large < small < static
    # 256 and 4,096 tokens of 16 x 16 px, the ends of the line: mu 0.5 and 1.15.
    for found, mu in ((small, 0.5), (large, 1.15)):
        assert found == mean_rank_of(config, spec, scheduler={"shift": math.exp(mu)}, size=SQUARE)


def test_a_dynamic_shift_of_a_family_without_one_is_unknown(tmp_path: Path) -> None:
    spec = replace(registry.specs()["flux"], dynamic_shift=None)
    dynamic = {"use_dynamic_shifting": True}
    assert mean_rank_of(run_of(tmp_path, "flux"), spec, scheduler=dynamic, size=SQUARE) is None


@pytest.mark.parametrize("num_tokens", [16, 1024, 4096, 5000])
def test_the_shift_of_flux2_is_its_pipelines(num_tokens: int) -> None:
    expected = math.exp(compute_empirical_mu(num_tokens, 50))
    assert empirical_shift({}, num_tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "shift"),
    [({}, 7.563), ({"flux2_training_shift": "flux1"}, math.exp(1.15))],
    ids=["sampling", "flux1"],
)
def test_the_forecast_of_flux2_takes_its_shift_of_training(
    tmp_path: Path, keys: dict[str, Any], shift: float
) -> None:
    config, spec = run_of(tmp_path, "flux2", rank=32, **keys), registry.specs()["flux2"]
    found = mean_rank_of(config, spec, scheduler={"use_dynamic_shifting": True}, size=SQUARE)
    fixed = mean_rank_of(config, spec, scheduler={"shift": shift}, size=SQUARE)
    assert found == pytest.approx(fixed, abs=0.01)


def test_an_adapter_without_a_rank_schedule_has_no_forecast(tmp_path: Path) -> None:
    config = run_of(tmp_path, "sdxl", lora_type="standard")
    assert mean_rank_of(config, registry.specs()["sdxl"], scheduler=None, size=SQUARE) is None


def test_under_a_quarter_of_the_rank_is_low(tmp_path: Path) -> None:
    lycoris = run_of(tmp_path, "sdxl", rank=32).lycoris
    assert lycoris is not None
    assert is_low(RankForecast(7.9, {}), lycoris)
    assert not is_low(RankForecast(8.0, {}), lycoris)


def test_entries_with_values_of_their_own_have_their_own_forecast(tmp_path: Path) -> None:
    # Of 4 timesteps, shares 1, 3/4, 2/4, 1/4: Attention, rank 4 from 2; FeedForward, rank 8 from its half,
    # with an exponent; a third entry has another rank alone and follows the network's schedule.
    entries = {
        "Attention": {"tlora_min_rank": 2},
        "FeedForward": {"dim": 8, "tlora_alpha": 2.0},
        "Other": {"dim": 2},
    }
    config = run_of(tmp_path, "sdxl", rank=4, tlora_min_rank=0.5, apply_preset={"module_algo_map": entries})
    spec = replace(registry.specs()["sdxl"], num_train_timesteps=4)
    forecast = expected_mean_rank(config, spec, scheduler=None, size=SQUARE)
    assert forecast == RankForecast(
        mean=(4 + 3 + 3 + 2) / 4,
        entries={"Attention": ((4 + 3 + 3 + 2) / 4, 4), "FeedForward": ((8 + 6 + 5 + 4) / 4, 8)},
    )

"""The mean active rank that a run will train with, against hand-computed numbers and real draws."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec, Size
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.flow_matching import (
    distribution_of,
    sample_sigma,
    shift_sigma,
    sigma_to_timestep,
)
from simpletuner.helpers.models.flux2.spec import empirical_shift
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
    ],
    ids=str,
)
def test_a_flow_run_is_forecast_as_it_draws(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = run_of(tmp_path, "flux", **keys)
    mean = mean_rank_of(config, registry.specs()["flux"], scheduler=None, size=SQUARE)
    schedule, distribution = RankSchedule(max_rank=32), distribution_of(config.noise)
    shift = keys["flow_schedule_shift"] or 1.0
    drawn = [sample_sigma(distribution, seed=1, sample_index=index) for index in range(3000)]
    ranks = [schedule.rank_at(sigma_to_timestep(shift_sigma(sigma, shift))) for sigma in drawn]
    assert mean == pytest.approx(fmean(ranks), abs=0.5)


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

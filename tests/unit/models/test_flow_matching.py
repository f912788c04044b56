"""Noise levels, shift, noise and target of flow-matching models."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from scipy import stats

from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.flow_matching import (
    add_noise,
    distribution_of,
    draw_guidance,
    sample_sigma,
    sampling_sigmas,
    shift_sigma,
    sigma_to_timestep,
    unshifted_sampler,
)
from simpletuner.helpers.models.noising import draw_noise
from simpletuner.helpers.models.shift import DynamicShift, dynamic_shift, static_shift

SIGMOID = distribution_of(NoiseConfig())
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize(
    ("sigma", "shift", "expected"),
    [
        (0.5, 1.0, 0.5),
        (0.5, 3.0, 0.75),
        (0.25, 3.0, 0.5),
        (1.0, 3.0, 1.0),
        (0.0, 3.0, 0.0),
        (0.75, 1 / 3, 0.5),
    ],
)
def test_shift_matches_hand_computed_values(sigma: float, shift: float, expected: float) -> None:
    assert shift_sigma(sigma, shift) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("num_tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (1024, 0.63)])
def test_dynamic_shift_is_linear_in_the_number_of_tokens(num_tokens: int, mu: float) -> None:
    assert dynamic_shift(DYNAMIC)(num_tokens) == pytest.approx(math.exp(mu))
    assert math.log(DynamicShift()(num_tokens)) == pytest.approx(calculate_shift(num_tokens))


@pytest.mark.parametrize(
    ("keys", "scheduler", "shift"),
    [
        ({}, DYNAMIC, None),
        ({}, {"shift": 3.0}, 3.0),
        ({}, {}, 1.0),
        ({"flow_schedule_shift": 2.0}, DYNAMIC, 2.0),
        ({"flow_schedule_shift": 0}, DYNAMIC, 1.0),
        ({"flow_schedule_auto_shift": True}, {"shift": 1.0}, None),
    ],
)
def test_shift_is_the_users_else_the_models(
    keys: dict[str, object], scheduler: dict[str, object], shift: float | None
) -> None:
    assert static_shift(NoiseConfig.model_validate(keys), scheduler) == shift


def test_timestep_is_the_float32_product_as_the_schedulers_form_it() -> None:
    sigmas = torch.arange(1, 1001, dtype=torch.float64).div(1000).float()
    found = [sigma_to_timestep(float(sigma)) for sigma in sigmas]
    assert found == (sigmas * 1000).int().tolist()
    assert sum(int(float(sigma) * 1000) != each for sigma, each in zip(sigmas, found, strict=True)) > 400


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(0.7)])
def test_sampling_levels_are_those_of_the_stock_scheduler(shift: float) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28))
    ours = FlowMatchEulerDiscreteScheduler(shift=1.0)
    ours.set_timesteps(sigmas=sampling_sigmas(28, shift))
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=2e-7)


def mode_cdf(sigma: Any) -> Any:
    """Share of noise levels below sigma: 1 minus the share at which equation 20 gives sigma, by bisection."""

    def share_of(level: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            found = 1 - middle - 1.2 * (math.cos(math.pi / 2 * middle) ** 2 - 1 + middle)
            low, high = (middle, high) if found > level else (low, middle)
        return 1 - low

    return np.vectorize(share_of)(sigma)


@pytest.mark.parametrize(
    ("keys", "cumulative"),
    [
        ({}, lambda s: stats.norm.cdf(np.log(s / (1 - s)))),
        ({"flow_sigmoid_scale": 2.0}, lambda s: stats.norm.cdf(np.log(s / (1 - s)) / 2)),
        ({"flow_sigmoid_mean": -1.0}, lambda s: stats.norm.cdf(np.log(s / (1 - s)) + 1)),
        ({"flow_use_uniform_schedule": True}, stats.uniform.cdf),
        ({"flow_use_mode_schedule": True, "flow_mode_schedule_scale": 0.0}, stats.uniform.cdf),
        ({"flow_use_mode_schedule": True, "flow_mode_schedule_scale": 1.2}, mode_cdf),
        ({"flow_cubic_schedule_weights": [1.0, 3.0]}, lambda s: (s + s * s) / 2),
        (
            {"min_timestep": 250, "max_timestep": 750, "flow_use_uniform_schedule": True},
            stats.uniform(0.25, 0.5).cdf,
        ),
        (
            {
                "flow_use_beta_schedule": True,
                "flow_beta_schedule_alpha": 3.0,
                "flow_beta_schedule_beta": 1.5,
            },
            stats.beta(3.0, 1.5).cdf,
        ),
    ],
    ids=["sigmoid", "wide sigmoid", "low", "uniform", "mode 0", "mode", "linear", "range", "beta"],
)
def test_noise_levels_follow_the_distribution_that_was_asked_for(
    keys: dict[str, object], cumulative: object
) -> None:
    distribution = distribution_of(NoiseConfig.model_validate(keys))
    drawn = [sample_sigma(distribution, shift=1.0, seed=3, sample_index=index) for index in range(2000)]
    assert stats.kstest(drawn, cumulative).pvalue > 0.01


def test_noised_batch_lies_on_the_line_from_image_to_noise() -> None:
    clean = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(clean, distribution=SIGMOID, shift=3.0, sample_indices=range(5), seed=7)
    assert noisy.sigmas is not None
    sigma = torch.tensor(noisy.sigmas)[:, None, None, None]
    noise = clean + noisy.target
    torch.testing.assert_close(noisy.latents, (1 - sigma) * clean + sigma * noise)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert noisy.timesteps == tuple(int(torch.tensor(each) * 1000) for each in noisy.sigmas)
    assert all(float(np.float32(each)) == each for each in noisy.sigmas)
    assert noisy.weight.tolist() == [1.0] * 5


@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8, 8)], ids=["3 axes", "5 axes"])
def test_latents_of_any_number_of_axes_are_noised_sample_by_sample(shape: tuple[int, ...]) -> None:
    clean = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(clean, distribution=SIGMOID, shift=3.0, sample_indices=[4, 9, 2], seed=7)
    assert noisy.latents.shape == noisy.target.shape == clean.shape
    assert noisy.sigmas is not None
    noise = draw_noise([4, 9, 2], seed=7, shape=shape)
    for index, sigma in enumerate(noisy.sigmas):
        torch.testing.assert_close(
            noisy.latents[index], (1 - sigma) * clean[index] + sigma * noise[index], rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(noisy.target, noise - clean)


def test_a_sample_is_noised_alike_in_any_batch() -> None:
    clean = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = add_noise(clean, distribution=SIGMOID, shift=3.0, sample_indices=[4, 9, 2], seed=7)
    alone = add_noise(clean[1:2].bfloat16(), distribution=SIGMOID, shift=3.0, sample_indices=[9], seed=7)
    assert alone.latents.dtype == torch.float32
    assert together.sigmas is not None
    assert alone.sigmas == together.sigmas[1:2]
    other = add_noise(clean, distribution=SIGMOID, shift=3.0, sample_indices=[4, 9, 2], seed=8)
    assert other.sigmas != together.sigmas


def test_guidance_is_constant_or_drawn_for_each_sample() -> None:
    constant = NoiseConfig(flux_guidance_value=3.5)
    assert draw_guidance(constant, sample_indices=[0, 1], seed=1) == (3.5, 3.5)
    ranged = NoiseConfig(flux_guidance_mode="random-range", flux_guidance_min=1, flux_guidance_max=4)
    drawn = draw_guidance(ranged, sample_indices=range(500), seed=1)
    assert 1 <= min(drawn) < 1.1
    assert 3.9 < max(drawn) <= 4
    assert draw_guidance(ranged, sample_indices=[7], seed=1) == (drawn[7],)


@pytest.mark.parametrize("name", ["ddim", "nope"])
def test_a_sampler_of_another_noise_process_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}.*euler"):
        unshifted_sampler(cast(Any, None), name=name)


def test_levels_of_a_batch_are_the_factors_of_its_mixture() -> None:
    noisy = add_noise(
        torch.zeros(3, 1, 1, 1), distribution=SIGMOID, shift=3.0, sample_indices=range(3), seed=7
    )
    assert noisy.sigmas is not None
    assert noisy.noise_scales == noisy.sigmas
    assert noisy.signal_scales == tuple(1 - sigma for sigma in noisy.sigmas)
    assert noisy.noise_to_signal == tuple(sigma / (1 - sigma) for sigma in noisy.sigmas)


@pytest.mark.parametrize("levels", [[0.25, 0.5, 1.0], [250, 500, 1000]], ids=["sigmas", "timesteps"])
def test_custom_timesteps_are_drawn_alike_without_a_shift(levels: list[float]) -> None:
    distribution = distribution_of(NoiseConfig(flow_custom_timesteps=levels))
    drawn = [sample_sigma(distribution, shift=3.0, seed=1, sample_index=index) for index in range(900)]
    counts = {level: drawn.count(level) for level in (0.25, 0.5, 1.0)}
    assert sum(counts.values()) == 900
    assert all(abs(number - 300) < 57 for number in counts.values())  # four standard deviations


def test_custom_timesteps_in_turn_follow_the_sample_index() -> None:
    noise = NoiseConfig(flow_custom_timesteps=(0.5, 0.1, 1.0), flow_timesteps_mode="round-robin")
    distribution = distribution_of(noise)
    noisy = add_noise(
        torch.zeros(9, 1, 1, 1), distribution=distribution, shift=3.0, sample_indices=range(4, 13), seed=1
    )
    assert noisy.timesteps == (100, 1000, 500) * 3


def test_a_timestep_range_holds_after_the_shift() -> None:
    noise = NoiseConfig(min_timestep=200, max_timestep=600)
    distribution = distribution_of(noise)
    drawn = [
        sigma_to_timestep(sample_sigma(distribution, shift=8.0, seed=1, sample_index=index))
        for index in range(500)
    ]
    assert 200 <= min(drawn) < 300
    assert 590 < max(drawn) <= 600


def test_shares_give_the_quantiles_of_the_drawn_noise_levels() -> None:
    clean = torch.zeros(3, 4, 8, 8)
    options = {"distribution": SIGMOID, "shift": 3.0, "sample_indices": [4, 9, 2], "seed": 7}
    found = add_noise(clean, **options, shares=[0.1, 0.5, 0.9])
    levels = [shift_sigma(1 / (1 + math.exp(-stats.norm.ppf(share))), 3.0) for share in (0.1, 0.5, 0.9)]
    assert found.sigmas == pytest.approx(levels, rel=1e-6)
    assert found.timesteps == tuple(int(1000 * level) for level in levels)
    noise = draw_noise([4, 9, 2], seed=7, shape=clean.shape[1:])
    assert torch.equal(found.target, noise)
    assert torch.equal(add_noise(clean, **options).target, noise)


def test_shares_take_custom_noise_levels_too() -> None:
    distribution = distribution_of(
        NoiseConfig(flow_custom_timesteps=[100, 500, 900], flow_timesteps_mode="round-robin")
    )
    clean = torch.zeros(3, 4, 8, 8)
    options = {"distribution": distribution, "shift": 3.0, "sample_indices": [7, 7, 7], "seed": 1}
    assert add_noise(clean, **options, shares=[0.1, 0.5, 0.9]).timesteps == (100, 500, 900)

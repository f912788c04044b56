"""Timesteps, noise, targets and loss weights of diffusion models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.diffusion import (
    DiffusionPrediction,
    DiffusionSchedule,
    add_coarse_noise,
    add_noise,
    debiased,
    draw_timesteps,
    loss_weight,
    q_sample,
    soft_min_snr,
    timesteps_at,
    velocity,
)
from simpletuner.helpers.models.noising import draw_noise, generator_of


def schedule(prediction: DiffusionPrediction = "epsilon", **keys: Any) -> DiffusionSchedule:
    alpha_bars = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    return DiffusionSchedule(alpha_bars, prediction=prediction, noise=NoiseConfig(**keys))


@pytest.mark.parametrize(
    ("alpha_bar", "gamma", "prediction", "weight"),
    [
        (0.8, None, "epsilon", 1.0),
        (0.8, 5.0, "epsilon", 1.0),  # snr 4 stays below gamma
        (0.9, 5.0, "epsilon", 5 / 9),  # snr 9
        (0.5, 0.5, "epsilon", 0.5),  # snr 1
        (0.0, 5.0, "epsilon", 1.0),  # no signal: the limit
        (0.8, None, "v_prediction", 1.0),
        (0.8, 5.0, "v_prediction", 4 / 5),
        (0.9, 5.0, "v_prediction", 5 / 10),
        (0.5, 0.5, "v_prediction", 0.25),
        (0.0, 5.0, "v_prediction", 0.0),
    ],
)
def test_loss_weight_matches_hand_computed_values(
    alpha_bar: float, gamma: float | None, prediction: DiffusionPrediction, weight: float
) -> None:
    noise = NoiseConfig(snr_gamma=gamma)
    found = loss_weight(torch.tensor([alpha_bar]), prediction=prediction, noise=noise)
    torch.testing.assert_close(found, torch.tensor([weight]))


def test_q_sample_and_velocity_match_hand_computed_values() -> None:
    clean, noise, alpha_bar = torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(0.64)
    assert q_sample(clean, noise, alpha_bar=alpha_bar).item() == pytest.approx(0.8 * 2 - 0.6)
    assert velocity(clean, noise, alpha_bar=alpha_bar).item() == pytest.approx(-0.8 - 0.6 * 2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noised_batch_agrees_with_the_scheduler_of_diffusers(prediction: DiffusionPrediction) -> None:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(latents, schedule=schedule(prediction), sample_indices=[0, 1, 2, 3], seed=7)
    stock = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise, timesteps = draw_noise([0, 1, 2, 3], seed=7, shape=(4, 8, 8)), torch.tensor(noisy.timesteps)
    torch.testing.assert_close(noisy.latents, stock.add_noise(latents, noise, timesteps))
    expected = noise if prediction == "epsilon" else stock.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(noisy.target, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8, 8)], ids=["3 axes", "5 axes"])
def test_latents_of_any_number_of_axes_are_noised_sample_by_sample(
    prediction: DiffusionPrediction, shape: tuple[int, ...]
) -> None:
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(latents, schedule=schedule(prediction), sample_indices=[5, 6, 7], seed=1)
    noise = draw_noise([5, 6, 7], seed=1, shape=shape)
    assert noisy.latents.shape == noisy.target.shape == latents.shape
    for index, timestep in enumerate(noisy.timesteps):
        alpha_bar = float(schedule().alpha_bars[timestep])
        signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        expected = signal * latents[index] + spread * noise[index]
        torch.testing.assert_close(noisy.latents[index], expected, rtol=1e-5, atol=1e-6)
        target = noise[index] if prediction == "epsilon" else signal * noise[index] - spread * latents[index]
        torch.testing.assert_close(noisy.target[index], target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"snr_gamma": 5.0},
        {"offset_noise": True, "noise_offset_probability": 0.5},
        {"multires_noise_iterations": 6},
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0},
    ],
    ids=str,
)
def test_noised_batch_gives_a_sample_the_same_noise_in_every_batch(keys: dict[str, Any]) -> None:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = add_noise(latents, schedule=schedule(**keys), sample_indices=[5, 6, 7, 8], seed=1)
    for index, position in enumerate([5, 6, 7, 8]):
        alone = add_noise(
            latents[index : index + 1], schedule=schedule(**keys), sample_indices=[position], seed=1
        )
        assert alone.timesteps == (together.timesteps[index],)
        assert torch.equal(alone.latents[0], together.latents[index])
        assert torch.equal(alone.target[0], together.target[index])
        assert torch.equal(alone.weight[0], together.weight[index])


def test_noised_batch_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    add_noise(torch.zeros(1, 4, 8, 8), schedule=schedule(), sample_indices=[0], seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_noised_batch_computes_in_float32_for_16_bit_latents() -> None:
    noisy = add_noise(
        torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), schedule=schedule(), sample_indices=[0], seed=1
    )
    assert noisy.latents.dtype == noisy.target.dtype == noisy.weight.dtype == torch.float32


def test_timesteps_are_uniform_over_the_whole_range() -> None:
    drawn = torch.tensor(draw_timesteps(range(4000), seed=0, weights=torch.ones(10)))
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    # Four standard deviations of a binomial count of 4000 draws with p = 0.1: 4 * 19.
    assert (counts - 400).abs().max() < 76


def test_timesteps_and_noise_differ_between_positions_and_seeds() -> None:
    weights = torch.ones(1000)
    assert draw_timesteps(range(8), seed=0, weights=weights) != draw_timesteps(
        range(8), seed=1, weights=weights
    )
    first, second = draw_noise([0, 1], seed=0, shape=(4, 8, 8))
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw_noise([0], seed=1, shape=(4, 8, 8))[0])


def test_noise_is_standard_normal() -> None:
    noise = draw_noise(range(16), seed=0, shape=(4, 32, 32))
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("snr", "prediction", "gamma", "sigma_data", "weight"),
    [
        (5.0, "epsilon", 5.0, 1.0, 1 / 2),
        (1.0, "epsilon", 5.0, 1.0, 5 / 6),
        (9.0, "epsilon", 1.0, 0.5, 1 / (1 + 9 / 4)),
        (0.0, "epsilon", 5.0, 1.0, 1.0),
        (5.0, "v_prediction", 5.0, 1.0, 5 / 12),
        (9.0, "v_prediction", 1.0, 0.5, 0.9 / (1 + 9 / 4)),
        (0.0, "v_prediction", 5.0, 1.0, 0.0),
    ],
)
def test_soft_min_snr_matches_hand_computed_values(
    snr: float, prediction: DiffusionPrediction, gamma: float, sigma_data: float, weight: float
) -> None:
    found = soft_min_snr(torch.tensor([snr]), prediction=prediction, gamma=gamma, sigma_data=sigma_data)
    torch.testing.assert_close(found, torch.tensor([weight]))


def test_soft_min_snr_has_the_limits_of_min_snr() -> None:
    snr = torch.tensor([1e-4, 1e6])
    hard = loss_weight(snr / (1 + snr), prediction="epsilon", noise=NoiseConfig(snr_gamma=5))
    soft = soft_min_snr(snr, prediction="epsilon", gamma=5, sigma_data=1)
    torch.testing.assert_close(soft, hard, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("snr", "prediction", "weight"),
    [
        (4.0, "epsilon", 1 / 2),
        (0.25, "epsilon", 2.0),
        (1e6, "epsilon", 1 / 1000**0.5),
        (3.0, "v_prediction", 1 / 4),
        (1e6, "v_prediction", 1 / 1001),
    ],
)
def test_debiased_weight_matches_hand_computed_values(
    snr: float, prediction: DiffusionPrediction, weight: float
) -> None:
    torch.testing.assert_close(debiased(torch.tensor([snr]), prediction=prediction), torch.tensor([weight]))


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"debiased_estimation_loss": True}, 1 / 3),
        ({"debiased_estimation_loss": True, "snr_gamma": 5}, 5 / 27),
        ({"use_soft_min_snr": True, "snr_gamma": 3}, 3 / 12),
        ({"use_soft_min_snr": True, "snr_gamma": 3, "soft_min_snr_sigma_data": 2}, 3 / 39),
        ({"use_soft_min_snr": False, "snr_gamma": 3}, 3 / 9),
    ],
    ids=str,
)
def test_the_configured_weights_are_multiplied(keys: dict[str, Any], weight: float) -> None:
    # alpha_bar 0.9 is a signal-to-noise ratio of 9.
    found = loss_weight(torch.tensor([0.9]), prediction="epsilon", noise=NoiseConfig(**keys))
    torch.testing.assert_close(found, torch.tensor([weight]))


def test_debiased_weights_of_a_timestep_without_signal_are_refused() -> None:
    noise, alpha_bars = NoiseConfig(debiased_estimation_loss=True), torch.tensor([0.9, 0.0])
    with pytest.raises(ModelError, match="debiased_estimation_loss"):
        DiffusionSchedule(alpha_bars, prediction="epsilon", noise=noise)
    assert DiffusionSchedule(alpha_bars, prediction="v_prediction", noise=noise)


def test_levels_of_a_batch_are_the_factors_of_its_mixture() -> None:
    noisy = add_noise(torch.ones(3, 4, 8, 8), schedule=schedule(), sample_indices=[5, 6, 7], seed=1)
    noise = draw_noise([5, 6, 7], seed=1, shape=(4, 8, 8))
    for index, timestep in enumerate(noisy.timesteps):
        alpha_bar = float(schedule().alpha_bars[timestep])
        expected = noisy.signal_scales[index] + noisy.noise_scales[index] * noise[index]
        torch.testing.assert_close(noisy.latents[index], expected)
        assert noisy.noise_to_signal[index] == pytest.approx(((1 - alpha_bar) / alpha_bar) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_offset_noise_shifts_each_channel_by_its_own_number(prediction: DiffusionPrediction) -> None:
    keys = {"offset_noise": True, "noise_offset": 0.5, "noise_offset_probability": 1.0}
    latents = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, noisy = (
        add_noise(latents, schedule=schedule(prediction, **each), sample_indices=range(4), seed=1)
        for each in ({}, keys)
    )
    assert noisy.timesteps == plain.timesteps
    scale = torch.tensor(noisy.noise_scales)[:, None, None, None]
    added = (noisy.latents - plain.latents) / scale  # [B, C, h, w]
    offset = added.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(added, offset.expand_as(added), rtol=1e-3, atol=1e-4)
    assert len({round(float(each), 4) for each in offset.flatten()}) == 12  # of every channel and sample
    assert offset.std().item() == pytest.approx(0.5, abs=0.3)
    # The offset is part of the noise, so the target has it as well.
    signal = torch.tensor(noisy.signal_scales)[:, None, None, None] if prediction != "epsilon" else 1.0
    torch.testing.assert_close(noisy.target - plain.target, signal * added, rtol=1e-3, atol=1e-4)


def test_offset_noise_has_the_strength_and_the_share_that_are_set() -> None:
    indices = range(400)
    latents = torch.zeros(400, 4, 1, 1)

    def added(**keys: float) -> torch.Tensor:
        with_offset = schedule(offset_noise=True, **keys)
        both = [
            add_noise(latents, schedule=each, sample_indices=indices, seed=1)
            for each in (schedule(), with_offset)
        ]
        return (both[1].target - both[0].target).flatten(1)

    quarter = added(noise_offset=0.3)
    touched = quarter.abs().sum(dim=1) > 0
    # Four standard deviations of a share of 0.25 of 400: 0.087.
    assert touched.float().mean().item() == pytest.approx(0.25, abs=0.087)
    # Of 1,600 normal numbers: 0.3 within four standard errors.
    assert added(noise_offset=0.3, noise_offset_probability=1).std().item() == pytest.approx(0.3, abs=0.022)
    assert not added(noise_offset_probability=0).any()


def test_coarse_noise_matches_its_definition() -> None:
    noise = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    found = add_coarse_noise(noise, iterations=2, discount=0.5, generator=generator_of(1, "a", 0))
    generator = generator_of(1, "a", 0)
    torch.rand((), generator=generator)
    first = torch.randn(2, 8, 12, generator=generator)
    ratio = 2 + 2 * float(torch.rand((), generator=generator))
    size = (int(8 / ratio), int(12 / ratio))
    second = torch.randn(2, *size, generator=generator)
    enlarged = torch.nn.Upsample(size=(8, 12), mode="bilinear")(second[None])[0]
    expected = noise + first + 0.5 * enlarged
    torch.testing.assert_close(found, expected / expected.std())


def test_coarse_noise_ends_at_one_latent_and_keeps_its_deviation() -> None:
    noise = draw_noise([0], seed=0, shape=(4, 8, 8))[0]
    few, many = (
        add_coarse_noise(noise, iterations=number, discount=0.9, generator=generator_of(0, "a", 0))
        for number in (4, 40)
    )
    assert torch.equal(few, many)  # 8 / 2**3 is 1 at the latest
    assert few.std().item() == pytest.approx(1)
    # Neighbours are alike, as they are in no white noise.
    assert (few[:, :, 1:] * few[:, :, :-1]).mean() > 0.2 > abs((noise[:, :, 1:] * noise[:, :, :-1]).mean())


def test_multires_noise_is_the_noise_of_the_target_too() -> None:
    keys = {"multires_noise_iterations": 6, "multires_noise_discount": 0.8}
    latents = torch.zeros(2, 4, 16, 16)
    noisy = add_noise(latents, schedule=schedule(**keys), sample_indices=[3, 4], seed=1)
    scale = torch.tensor(noisy.noise_scales)[:, None, None, None]
    torch.testing.assert_close(noisy.latents, scale * noisy.target)
    plain = add_noise(latents, schedule=schedule(), sample_indices=[3, 4], seed=1)
    assert not torch.equal(noisy.target, plain.target)
    assert noisy.target[0].std().item() == pytest.approx(1)


def test_timesteps_are_drawn_by_their_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    drawn = torch.tensor(draw_timesteps(range(4000), seed=0, weights=weights))
    counts = torch.bincount(drawn, minlength=4)
    assert counts[[0, 3]].tolist() == [0, 0]
    # Four standard deviations of 4,000 draws with p = 1/4: 110.
    assert abs(int(counts[1]) - 1000) < 110


def test_timesteps_without_a_bias_are_those_of_the_plain_draw() -> None:
    drawn = add_noise(torch.zeros(4, 1, 1, 1), schedule=schedule(), sample_indices=range(4), seed=7).timesteps
    generators = [generator_of(7, "timestep", index) for index in range(4)]
    assert drawn == tuple(int(torch.randint(1000, (1,), generator=each)) for each in generators)


def test_shares_give_the_quantiles_of_the_drawn_timesteps() -> None:
    assert timesteps_at([0.1, 0.5, 0.9], weights=torch.ones(10)) == (1, 5, 9)
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0])
    assert timesteps_at([1e-9, 0.7, 0.76, 1 - 1e-9], weights=weights) == (1, 1, 2, 2)
    biased = schedule(min_timestep=200, max_timestep=600).timestep_weights
    assert timesteps_at([0.0625, 0.9375], weights=biased) == (225, 575)
    shares = [(index + 0.5) / 400 for index in range(400)]
    drawn = draw_timesteps(range(4000), seed=1, weights=schedule().timestep_weights)
    at = timesteps_at(shares, weights=schedule().timestep_weights)
    assert sum(at) / len(at) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)


def test_noise_at_shares_is_that_of_the_sample_index_at_another_timestep() -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = add_noise(latents, schedule=schedule(), sample_indices=[5, 6], seed=1, shares=[0.25, 0.75])
    assert found.timesteps == (250, 750)
    assert torch.equal(found.target, draw_noise([5, 6], seed=1, shape=latents.shape[1:]))
    drawn = add_noise(latents, schedule=schedule(), sample_indices=[5, 6], seed=1)
    assert torch.equal(found.target, drawn.target)
    assert drawn.timesteps != found.timesteps

"""Timesteps, noise, targets and loss weights of diffusion models."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from simpletuner.helpers.models.diffusion import (
    DiffusionPrediction,
    DiffusionSchedule,
    add_noise,
    draw_noise,
    draw_timesteps,
    loss_weight,
    q_sample,
    velocity,
)


def schedule(prediction: DiffusionPrediction = "epsilon", gamma: float | None = None) -> DiffusionSchedule:
    alpha_bars = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    return DiffusionSchedule(alpha_bars, prediction=prediction, snr_gamma=gamma)


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
    found = loss_weight(torch.tensor([alpha_bar]), prediction=prediction, snr_gamma=gamma)
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


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_noised_batch_gives_a_sample_the_same_noise_in_every_batch(gamma: float | None) -> None:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = add_noise(latents, schedule=schedule(gamma=gamma), sample_indices=[5, 6, 7, 8], seed=1)
    for index, position in enumerate([5, 6, 7, 8]):
        alone = add_noise(
            latents[index : index + 1], schedule=schedule(gamma=gamma), sample_indices=[position], seed=1
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
    drawn = torch.tensor(draw_timesteps(range(4000), seed=0, num_timesteps=10))
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    # Four standard deviations of a binomial count of 4000 draws with p = 0.1: 4 * 19.
    assert (counts - 400).abs().max() < 76


def test_timesteps_and_noise_differ_between_positions_and_seeds() -> None:
    assert draw_timesteps(range(8), seed=0, num_timesteps=1000) != draw_timesteps(
        range(8), seed=1, num_timesteps=1000
    )
    first, second = draw_noise([0, 1], seed=0, shape=(4, 8, 8))
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw_noise([0], seed=1, shape=(4, 8, 8))[0])


def test_noise_is_standard_normal() -> None:
    noise = draw_noise(range(16), seed=0, shape=(4, 32, 32))
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)

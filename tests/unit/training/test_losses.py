"""Losses and their thresholds, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from simpletuner.helpers.choices.losses import LOSSES, Loss
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.training.losses import (
    build_loss,
    constant_threshold,
    exponential_threshold,
    threshold_by_snr,
    weighted_huber,
    weighted_mse,
    weighted_smooth_l1,
)


def test_weighted_mse_of_two_samples_is_the_mean_of_their_weighted_means() -> None:
    target = torch.zeros(2, 1, 1, 2)
    prediction = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])
    # Sample means (1 + 9) / 2 = 5 and (4 + 0) / 2 = 2, weights 0.5 and 3: (2.5 + 6) / 2.
    losses = weighted_mse(prediction, target, torch.tensor([0.5, 3.0]))
    assert losses.tolist() == [2.5, 6.0]
    assert losses.mean().item() == 4.25


def test_weighted_mse_with_weights_of_one_is_the_plain_mean_squared_error() -> None:
    prediction, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    plain = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(weighted_mse(prediction, target, torch.ones(3)).mean(), plain)


def test_mean_of_the_samples_has_the_gradient_of_the_whole_to_the_bit() -> None:
    target, weight = torch.randn(3, 4, 5, 6), torch.rand(3)
    grads = []
    for loss_of in (
        lambda prediction: weighted_mse(prediction, target, weight).mean(),
        lambda prediction: ((prediction - target).square().flatten(1).mean(dim=1) * weight).mean(),
    ):
        prediction = torch.linspace(-2, 2, 360).view(3, 4, 5, 6).requires_grad_()
        loss_of(prediction).backward()
        grads.append(prediction.grad)
    assert torch.equal(*grads)


def test_weighted_mse_scales_each_samples_gradient_by_its_weight() -> None:
    prediction = torch.ones(2, 1, 1, 1, requires_grad=True)
    weighted_mse(prediction, torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 4.0])).mean().backward()
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [1.0, 4.0]  # d/dx of w x^2 / 2 at x = 1


@pytest.mark.parametrize("name", ["l2", "huber", "smooth_l1"])
def test_a_mask_multiplies_the_error_of_each_element_before_the_mean(name: str) -> None:
    # Two channels of one row of two cells; the mask is the same for both channels.
    prediction = torch.tensor([[[[1.0, 3.0]], [[2.0, 5.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]])
    mask = torch.tensor([[[[1.0, 0.5]]], [[[0.0, 0.25]]]])
    noisy = NoisyBatch(
        latents=prediction,
        target=torch.zeros_like(prediction),
        timesteps=(1, 1),
        weight=torch.tensor([2.0, 4.0]),
        signal_scales=(1.0, 1.0),
        noise_scales=(0.0, 0.0),
        loss_mask=mask,
    )
    loss = build_loss(NoiseConfig(loss_type=name), num_timesteps=1000)
    each = [
        loss(one.view(1, 1, 1, 1), _alone(noisy, row)) for row in (0, 1) for one in prediction[row].flatten()
    ]
    elements = torch.stack(each).view(2, 2, 1, 2)
    torch.testing.assert_close(loss(prediction, noisy), (elements * mask).flatten(1).mean(1))
    if name == "l2":
        # Sums of 1 + 4.5 + 4 + 12.5 and of twice 0.25, over four elements, times the weights 2 and 4.
        assert loss(prediction, noisy).tolist() == [11.0, 0.5]


def _alone(noisy: NoisyBatch, row: int) -> NoisyBatch:
    """One element of a sample, without its mask."""
    return replace(
        noisy,
        latents=torch.zeros(1, 1, 1, 1),
        target=torch.zeros(1, 1, 1, 1),
        timesteps=noisy.timesteps[:1],
        weight=noisy.weight[row : row + 1],
        signal_scales=(1.0,),
        noise_scales=(0.0,),
        loss_mask=None,
    )


def test_a_loss_of_three_arguments_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Loss(name="own", summary="Of others.", build=f"{__name__}:_own_loss")
    monkeypatch.setitem(LOSSES, "own", record)
    noisy = NoisyBatch(torch.ones(1, 1), torch.zeros(1, 1), (1,), torch.ones(1))
    noise = NoiseConfig.model_construct(**{**dict(NoiseConfig()), "loss_type": "own"})
    assert build_loss(noise, num_timesteps=1000)(torch.full((1, 1), 3.0), noisy).tolist() == [3.0]


def _own_loss(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (prediction - target).abs().flatten(1).mean(1) * weight


def test_huber_and_smooth_l1_match_hand_computed_values() -> None:
    # Errors 3 with c = 4, and 0.6 with c = 0.8: the roots are 5 and 1.
    prediction, target = torch.tensor([[[3.0, 0.0]], [[0.6, 0.6]]]), torch.zeros(2, 1, 2)
    weight, threshold = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.8])
    smooth = weighted_smooth_l1(prediction, target, weight, threshold=threshold)
    # 2 (5 - 4) and 0, of which the mean is 1; 2 (1 - 0.8) twice, times the weight 2.
    torch.testing.assert_close(smooth, torch.tensor([1.0, 0.8]))
    huber = weighted_huber(prediction, target, weight, threshold=threshold)
    torch.testing.assert_close(huber, torch.tensor([4.0, 0.64]))


def test_huber_is_squared_for_small_and_absolute_for_large_errors() -> None:
    c = torch.tensor([0.5])
    for error, expected in ((1e-5, 1e-10), (1e4, 2 * 0.5 * (1e4 - 0.5))):
        found = weighted_huber(torch.tensor([[error]]), torch.zeros(1, 1), torch.ones(1), threshold=c)
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("huber_c", "ratio", "expected"),
    [(0.1, 0.0, 1.0), (0.1, 1.0, 0.9 / 4 + 0.1), (0.2, 3.0, 0.8 / 16 + 0.2), (0.1, float("inf"), 0.1)],
)
def test_threshold_by_snr_matches_hand_computed_values(huber_c: float, ratio: float, expected: float) -> None:
    assert threshold_by_snr(huber_c, time=0.5, noise_to_signal=ratio) == pytest.approx(expected)


@pytest.mark.parametrize(("time", "expected"), [(0.0, 1.0), (0.5, 0.1), (1.0, 0.01), (0.25, 0.1**0.5)])
def test_exponential_threshold_matches_hand_computed_values(time: float, expected: float) -> None:
    assert exponential_threshold(0.01, time=time, noise_to_signal=7.0) == pytest.approx(expected)
    assert constant_threshold(0.01, time=time, noise_to_signal=7.0) == 0.01


BATCH = NoisyBatch(
    latents=torch.zeros(2, 1, 1),
    target=torch.zeros(2, 1, 1),
    timesteps=(250, 500),
    weight=torch.tensor([1.0, 3.0]),
    signal_scales=(1.0, 0.0),
    noise_scales=(0.0, 1.0),
)


@pytest.mark.parametrize(
    ("keys", "thresholds"),
    [
        ({}, (1.0, 0.1)),  # the noise-to-signal ratios are 0 and infinite
        ({"huber_schedule": "exponential", "huber_c": 0.0001}, (0.1, 0.01)),
        ({"huber_schedule": "constant", "huber_c": 0.3}, (0.3, 0.3)),
    ],
    ids=["snr", "exponential", "constant"],
)
@pytest.mark.parametrize(
    ("loss_type", "function"), [("huber", weighted_huber), ("smooth_l1", weighted_smooth_l1)]
)
def test_each_sample_has_the_threshold_of_its_noise_level(
    keys: dict[str, Any], thresholds: tuple[float, float], loss_type: str, function: Any
) -> None:
    loss = build_loss(NoiseConfig(loss_type=loss_type, **keys), num_timesteps=1000)
    prediction = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    # 250 and 500 of 1,000 timesteps: 0.0001 to the powers of 1/4 and 1/2.
    expected = function(prediction, BATCH.target, BATCH.weight, threshold=torch.tensor(thresholds))
    torch.testing.assert_close(loss(prediction, BATCH), expected)


def test_the_default_loss_is_squared() -> None:
    loss = build_loss(NoiseConfig(), num_timesteps=1000)
    assert loss(torch.tensor([0.5, 2.0]).view(2, 1, 1), BATCH).tolist() == [0.25, 12.0]

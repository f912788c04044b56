"""The weighted squared error, against numbers worked out by hand."""

from __future__ import annotations

import torch

from simpletuner.helpers.training.losses import weighted_mse


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

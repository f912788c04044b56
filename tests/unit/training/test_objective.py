"""Noise and loss of a micro-batch as the trainer gets them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.contracts import Batch, NoisyBatch, TextEmbeds
from simpletuner.helpers.models.diffusion import DiffusionSchedule
from simpletuner.helpers.models.diffusion import add_noise as add_diffusion_noise
from simpletuner.helpers.models.flow_matching import add_noise as add_flow_noise
from simpletuner.helpers.models.flow_matching import distribution_of
from simpletuner.helpers.models.noising import generator_of
from simpletuner.helpers.training.losses import build_loss
from simpletuner.helpers.training.objective import Objective, perturbation_strength


class Family:
    """A family whose add_noise is that of its kind of model."""

    def __init__(self, noise: NoiseConfig, *, is_flow: bool) -> None:
        self.noise, self.is_flow, self.spec = noise, is_flow, SimpleNamespace(num_train_timesteps=1000)

    def add_noise(self, latents: torch.Tensor, **drawn: Any) -> NoisyBatch:
        if self.is_flow:
            return add_flow_noise(latents, distribution=distribution_of(self.noise), shift=3.0, **drawn)
        schedule = DiffusionSchedule(torch.linspace(0.9, 0.1, 1000), prediction="epsilon", noise=self.noise)
        return add_diffusion_noise(latents, schedule=schedule, **drawn)


def objective(noise: NoiseConfig, *, is_flow: bool = False, step: int = 0) -> Objective:
    return Objective(
        family=cast(Any, Family(noise, is_flow=is_flow)),
        loss=build_loss(noise, num_timesteps=1000),
        noise=noise,
        seed=5,
        progress=Progress(step=step),
    )


def batch(*indices: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(20, 2, 4, 4, generator=generator)[list(indices)]
    return Batch(latents, TextEmbeds(torch.zeros(len(indices), 1, 1)), samples=(), sample_indices=indices)


@pytest.mark.parametrize("keys", [{}, {"input_perturbation": 0.2}], ids=range(2))
@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 4, 4)], ids=["plain", "masked"])
def test_the_mask_of_a_batch_goes_on_to_the_loss(keys: dict[str, Any], mask: torch.Tensor | None) -> None:
    found = objective(NoiseConfig(**keys)).add_noise(replace(batch(3, 4), loss_mask=mask))
    assert found.loss_mask is mask


@pytest.mark.parametrize(
    ("keys", "step", "strength"),
    [
        ({}, 0, 0.0),
        ({"input_perturbation": 0.2}, 10**6, 0.2),
        ({"input_perturbation": 0.2, "input_perturbation_steps": 10}, 0, 0.2),
        ({"input_perturbation": 0.2, "input_perturbation_steps": 10}, 5, 0.1),
        ({"input_perturbation": 0.2, "input_perturbation_steps": 10}, 10, 0.0),
        ({"input_perturbation": 0.2, "input_perturbation_steps": 10}, 11, 0.0),
    ],
)
def test_input_perturbation_falls_to_zero(keys: dict[str, Any], step: int, strength: float) -> None:
    assert perturbation_strength(NoiseConfig(**keys), step=step) == pytest.approx(strength)


@pytest.mark.parametrize("is_flow", [False, True], ids=["diffusion", "flow"])
def test_input_perturbation_changes_the_input_alone(is_flow: bool) -> None:
    noise = NoiseConfig(input_perturbation=0.4, input_perturbation_steps=10)
    plain = objective(NoiseConfig(), is_flow=is_flow).add_noise(batch(3, 4))
    noisy = objective(noise, is_flow=is_flow, step=5).add_noise(batch(3, 4))
    assert torch.equal(noisy.target, plain.target)
    assert noisy.timesteps == plain.timesteps
    for index, sample_index in enumerate((3, 4)):
        further = torch.randn(2, 4, 4, generator=generator_of(5, "perturbation", sample_index))
        expected = plain.latents[index] + 0.2 * plain.noise_scales[index] * further
        torch.testing.assert_close(noisy.latents[index], expected)


def test_input_perturbation_of_a_sample_is_the_same_in_every_batch() -> None:
    noise = NoiseConfig(input_perturbation=0.4)
    together = objective(noise).add_noise(batch(3, 4, 9))
    alone = objective(noise).add_noise(batch(9))
    assert torch.equal(together.latents[2], alone.latents[0])


def test_input_perturbation_follows_the_steps_that_a_checkpoint_keeps() -> None:
    noise = NoiseConfig(input_perturbation=0.4, input_perturbation_steps=10)
    running, resumed = objective(noise, step=3), objective(noise)
    first = running.add_noise(batch(1))
    assert not torch.equal(first.latents, resumed.add_noise(batch(1)).latents)
    resumed.progress.load_state_dict(running.progress.state_dict())
    assert torch.equal(first.latents, resumed.add_noise(batch(1)).latents)
    running.progress.advance(samples=1)
    assert not torch.equal(first.latents, running.add_noise(batch(1)).latents)


def test_huber_of_a_flow_batch_takes_c_from_sigma() -> None:
    noise = NoiseConfig(loss_type="smooth_l1", huber_c=0.1)
    aim = objective(noise, is_flow=True)
    noisy = aim.add_noise(batch(3, 4))
    losses = aim.sample_losses(noisy.target + 2, noisy)
    assert noisy.sigmas is not None
    for loss, sigma in zip(losses.tolist(), noisy.sigmas, strict=True):
        # 1 + s is 1 / (1 - sigma).
        c = 0.9 * (1 - sigma) ** 2 + 0.1
        assert loss == pytest.approx(2 * ((4 + c * c) ** 0.5 - c), rel=1e-4)

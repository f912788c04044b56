"""Losses and the schedules of their threshold; choices/losses.py has the record of each.

Shapes: B batch, ... the axes of one sample's latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.choices.losses import HUBER_SCHEDULES, LOSSES
from simpletuner.helpers.choices.losses import Loss as LossRecord

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.helpers.configuration.schema.noise import NoiseConfig
    from simpletuner.helpers.contracts import NoisyBatch

Loss = Callable[["Tensor", "NoisyBatch"], "Tensor"]
"""Prediction [B, ...] and its noisy batch -> weighted loss of each sample, [B]."""


def build_loss(noise: NoiseConfig, *, num_timesteps: int) -> Loss:
    """The configured loss.

    Args:
        noise: Loss, threshold and its schedule.
        num_timesteps: The timestep of noise alone, T.
    """
    record = LOSSES[noise.loss_type]
    function = record.load()
    has_threshold = isinstance(record, LossRecord) and record.has_threshold
    takes_mask = isinstance(record, LossRecord) and record.takes_mask
    threshold_at = HUBER_SCHEDULES[noise.huber_schedule].load()

    def loss(prediction: Tensor, noisy: NoisyBatch) -> Tensor:
        options: dict[str, Tensor | None] = {"mask": noisy.loss_mask} if takes_mask else {}
        if has_threshold:
            levels = zip(noisy.timesteps, noisy.noise_to_signal, strict=True)
            options["threshold"] = torch.tensor(
                [
                    threshold_at(noise.huber_c, time=timestep / num_timesteps, noise_to_signal=ratio)
                    for timestep, ratio in levels
                ],
                device=prediction.device,
            )
        losses: Tensor = function(prediction, noisy.target, noisy.weight, **options)
        return losses

    return loss


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample times its weight, [B].

    `prediction` and `target` are [B, ...] float32, `weight` is [B] float32; `mask`, a factor of each squared
    error, is [B, 1, h, w] float32.
    """
    return _weighted_mean(_squared_error(prediction, target), weight=weight, mask=mask)


def weighted_huber(
    prediction: Tensor, target: Tensor, weight: Tensor, *, threshold: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean of 2c (sqrt(d² + c²) - c) of each sample times its weight, [B]; d² for a small error d.

    `prediction` and `target` are [B, ...] float32, `weight` and `threshold`, c, are [B] float32; `mask`, a
    factor of each of these, is [B, 1, h, w] float32.

    Source: the pseudo-Huber loss, for diffusion models: Khrapov et al., arXiv:2403.16728.
    """
    return weighted_smooth_l1(prediction, target, weight * threshold, threshold=threshold, mask=mask)


def weighted_smooth_l1(
    prediction: Tensor, target: Tensor, weight: Tensor, *, threshold: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean of 2 (sqrt(d² + c²) - c) of each sample times its weight, [B]; 2 |d| for a large error d.

    `prediction` and `target` are [B, ...] float32, `weight` and `threshold`, c, are [B] float32; `mask`, a
    factor of each of these, is [B, 1, h, w] float32.

    Source: as `weighted_huber`, divided by c.
    """
    squared = _squared_error(prediction, target)
    c = threshold.view(-1, *[1] * (target.ndim - 1))  # [B, 1, ...]
    # sqrt(d² + c²) - c without the difference of two near numbers.
    errors = 2 * squared / ((squared + c.square()).sqrt() + c)
    return _weighted_mean(errors, weight=weight, mask=mask)


def threshold_by_snr(huber_c: float, *, time: float, noise_to_signal: float) -> float:
    """C from 1 without noise to huber_c at noise alone, by the ratio s of their amplitudes.

    Source: the SNR schedule of Khrapov et al., arXiv:2403.16728, with s = sqrt((1 - abar) / abar). For flow
    matching s = sigma / (1 - sigma) is this program's choice.
    """
    return float((1 - huber_c) / (1 + noise_to_signal) ** 2 + huber_c)


def exponential_threshold(huber_c: float, *, time: float, noise_to_signal: float) -> float:
    """exp(ln(huber_c) t / T), where `time` is t / T. Source: Khrapov et al., arXiv:2403.16728."""
    return float(huber_c**time)


def constant_threshold(huber_c: float, *, time: float, noise_to_signal: float) -> float:
    """huber_c."""
    return huber_c


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    assert prediction.shape == target.shape, f"prediction {prediction.shape} and target {target.shape} differ"
    return (prediction - target).square()


def _weighted_mean(errors: Tensor, *, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the errors of each sample, [B, ...], each times the mask, times its weight, [B]."""
    if mask is not None:
        errors = errors * mask
    assert weight.shape == errors.shape[:1], f"weight must be [B], got {tuple(weight.shape)}"
    return errors.flatten(1).mean(dim=1) * weight

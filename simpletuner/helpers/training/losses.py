"""Losses; choices/losses.py has the record of each.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simpletuner.helpers.choices.losses import LOSSES

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.helpers.configuration.schema.sections import TrainingConfig

Loss = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""Prediction and target [B, C, H, W], weight [B] -> loss of each sample [B]."""


def build_loss(config: TrainingConfig) -> Loss:
    """The configured loss."""
    loss: Loss = LOSSES[config.loss_type].load()
    return loss


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each sample times its weight, [B].

    `prediction` and `target` are [B, C, H, W] float32, `weight` is [B] float32.
    """
    assert prediction.shape == target.shape, f"prediction {prediction.shape} and target {target.shape} differ"
    assert weight.shape == target.shape[:1], f"weight must be [B], got {tuple(weight.shape)}"
    per_sample = (prediction - target).square().flatten(1).mean(dim=1)  # [B]
    return per_sample * weight

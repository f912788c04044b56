"""What is minimised.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each sample, times its weight; the loss is the mean of the [B] that is returned.

    `prediction` and `target` are [B, C, H, W] float32, `weight` is [B] float32.
    """
    assert prediction.shape == target.shape, f"prediction {prediction.shape} and target {target.shape} differ"
    assert weight.shape == target.shape[:1], f"weight must be [B], got {tuple(weight.shape)}"
    per_sample = (prediction - target).square().flatten(1).mean(dim=1)  # [B]
    return per_sample * weight

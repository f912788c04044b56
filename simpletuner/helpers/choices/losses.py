"""Losses and the schedules of their threshold: the values of `loss_type` and `huber_schedule`."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.registry import Choice, Registry

_LOSSES = "simpletuner.helpers.training.losses"


@dataclass(frozen=True, kw_only=True)
class Loss(Choice):
    """A loss; `build` names a function of prediction, target and weight: the loss of each sample, [B]."""

    takes_mask: bool = False
    """The function also takes the keyword `mask`, [B, 1, h, w] or None: a factor of each element's error,
    before the mean over a sample."""

    has_threshold: bool = False
    """The function also takes the keyword `threshold`: c of each sample, by huber_schedule."""


LOSSES: Registry[Choice] = Registry(
    Loss(
        name="l2",
        display_name="MSE",
        summary="Mean squared error.",
        build=f"{_LOSSES}:weighted_mse",
        takes_mask=True,
    ),
    Loss(
        name="huber",
        display_name="pseudo-Huber",
        summary="2c (sqrt(d² + c²) - c) for an error d: squared below c, above it in proportion to c d.",
        build=f"{_LOSSES}:weighted_huber",
        takes_mask=True,
        has_threshold=True,
    ),
    Loss(
        name="smooth_l1",
        summary="2 (sqrt(d² + c²) - c): the same divided by c, so that a small c does not lower it.",
        build=f"{_LOSSES}:weighted_smooth_l1",
        takes_mask=True,
        has_threshold=True,
    ),
)
HUBER_SCHEDULES: Registry[Choice] = Registry(
    Choice(
        name="snr",
        summary="(1 - huber_c) / (1 + s)² + huber_c, where s is the noise's amplitude over the signal's.",
        build=f"{_LOSSES}:threshold_by_snr",
    ),
    Choice(
        name="exponential",
        summary="huber_c to the power of t / T: 1 without noise, huber_c at noise alone.",
        build=f"{_LOSSES}:exponential_threshold",
    ),
    Choice(name="constant", summary="huber_c at every noise level.", build=f"{_LOSSES}:constant_threshold"),
)
"""`build` names a function of huber_c, and of a sample's `time`, t / T, and `noise_to_signal`."""

"""Losses: the values of `loss_type`."""

from __future__ import annotations

from simpletuner.helpers.choices.registry import Choice, Registry

LOSSES: Registry[Choice] = Registry(
    Choice(
        name="l2",
        display_name="MSE",
        summary="Mean squared error.",
        build="simpletuner.helpers.training.losses:weighted_mse",
    )
)
"""`build` names a function of prediction, target and weight that gives the loss of each sample."""

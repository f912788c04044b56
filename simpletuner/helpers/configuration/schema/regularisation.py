"""Regularisation data of config.json: what its samples are trained towards, and their weight."""

from __future__ import annotations

from typing import Literal

from simpletuner.helpers.configuration.schema.base import NonNegativeNumber, Section

RegularisationTarget = Literal["base", "data"]


class RegularisationConfig(Section):
    """Datasets with is_regularisation_data; no effect without one."""

    regularisation_target: RegularisationTarget = "base"
    """What their samples are trained towards: base, the prediction of the model without the adapter for the
    same noisy image and caption; data, the image itself, as others are, and an epoch draws as many of them as
    of the other images."""
    prior_loss_weight: NonNegativeNumber = 1.0
    """Factor on their loss."""

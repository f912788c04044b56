"""Builds the configured optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simpletuner.helpers.choices.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from simpletuner.helpers.configuration.schema.sections import OptimizerConfig


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over these parameters.

    Raises:
        MissingDependencyError: The optimiser's package is not installed.
    """
    record = OPTIMIZERS[config.optimizer]
    arguments: dict[str, Any] = {**record.defaults, "lr": config.learning_rate, **config.optimizer_config}
    if record.fused_devices:
        arguments["fused"] = parameters[0].device.type in record.fused_devices
    optimizer: type[Optimizer] = record.load()
    return optimizer(parameters, **arguments)

"""Optimisers by the name in the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import AdamW, Optimizer

from simpletuner.helpers.io.optional import require

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.configuration.schema.sections import OptimizerConfig

# One kernel for all parameters instead of several for each.
FUSED_DEVICES = ("cuda", "cpu", "xpu", "mps")
# Both from the README of the Prodigy package, for diffusion models.
PRODIGY_DEFAULTS = {"use_bias_correction": True, "safeguard_warmup": True}


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over these parameters, its arguments as optimizer_config gives them.

    Raises:
        MissingDependencyError: The optimiser's package is not installed.
    """
    arguments: dict[str, Any] = {"lr": config.learning_rate, **config.optimizer_config}
    if config.optimizer == "prodigy":
        prodigy: type[Optimizer] = require("prodigyopt", extra="optim").Prodigy
        return prodigy(parameters, **(PRODIGY_DEFAULTS | arguments))
    return AdamW(parameters, fused=parameters[0].device.type in FUSED_DEVICES, **arguments)

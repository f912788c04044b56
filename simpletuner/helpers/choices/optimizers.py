"""Optimisers: the values of `optimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simpletuner.helpers.choices.registry import ArgumentType, Choice, Registry


@dataclass(frozen=True, kw_only=True)
class Optimizer(Choice):
    """An optimiser; `build` names its class, called with the parameters, `lr` and the arguments."""

    arguments: Mapping[str, ArgumentType]
    """Keys of optimizer_config, under the names of the class."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Arguments that differ from the class's own defaults."""
    default_learning_rate: float = 1e-4
    fused_devices: tuple[str, ...] = ()
    """Device types with a fused kernel: one for all parameters instead of several for each."""
    group_state: tuple[str, ...] = ()
    """Entries of a parameter group that the optimiser changes; a checkpoint keeps them."""


_ADAM: Mapping[str, ArgumentType] = {"betas": "betas", "eps": "number", "weight_decay": "number"}

OPTIMIZERS = Registry(
    Optimizer(
        name="adamw",
        display_name="AdamW",
        summary="AdamW of torch.",
        build="torch.optim:AdamW",
        arguments=_ADAM,
        fused_devices=("cuda", "cpu", "xpu", "mps"),
    ),
    Optimizer(
        name="prodigy",
        display_name="Prodigy",
        summary="Estimates its own step size, which learning_rate scales.",
        build="prodigyopt:Prodigy",
        package="prodigyopt",
        extra="optim",
        arguments={
            **_ADAM,
            "beta3": "number",
            "decouple": "boolean",
            "use_bias_correction": "boolean",
            "safeguard_warmup": "boolean",
            "d0": "number",
            "d_coef": "number",
            "growth_rate": "number",
        },
        # Source: README of prodigyopt, for diffusion models.
        defaults={"use_bias_correction": True, "safeguard_warmup": True},
        default_learning_rate=1.0,
        group_state=("d", "d_max", "d_numerator", "d_denom", "k"),
    ),
)

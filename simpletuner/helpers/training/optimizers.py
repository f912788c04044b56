"""Builds the configured optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.helpers.choices.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from simpletuner.helpers.adapters.trainable import ParameterGroup
    from simpletuner.helpers.configuration.schema.sections import OptimizerConfig


def build_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over the parameters of these groups.

    Raises:
        MissingDependencyError: The optimiser's package is not installed.
    """
    record = OPTIMIZERS[config.optimizer]
    arguments: dict[str, Any] = {**record.defaults, "lr": config.learning_rate, **config.optimizer_config}
    if record.fused_devices:
        arguments["fused"] = groups[0].parameters[0].device.type in record.fused_devices
    optimizer: type[Optimizer] = record.load()
    return optimizer([_arguments_of(group) for group in groups], **arguments)


def _arguments_of(group: ParameterGroup) -> dict[str, Any]:
    own = {"lr": group.learning_rate, "weight_decay": group.weight_decay}
    return {"params": group.parameters} | {key: value for key, value in own.items() if value is not None}


def weights_for_use(optimizer: Optimizer, config: OptimizerConfig) -> AbstractContextManager[None]:
    """Context for images and adapter files: the averages of a schedule-free optimiser, else as trained."""
    has_averages = OPTIMIZERS[config.optimizer].has_averages
    return averaged_weights(optimizer) if has_averages else nullcontext()


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """The averages of a schedule-free optimiser in place of the trained weights, which stay as they are.

    The averages are computed in copies: switching the weights there and back changes their last bits.
    """
    groups, state = optimizer.param_groups, optimizer.state
    parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    trained, entries = [parameter.data for parameter in parameters], [dict(group) for group in groups]
    # In the dtype of the optimiser's own weights, "z". Copies, since a parameter that changes its dtype loses
    # the hooks of DDP.
    copies = {each: _copy(each, state.get(each, {}).get("z", each).dtype) for each in parameters}
    for group in groups:
        group["params"] = [copies[each] for each in group["params"]]
    try:
        move_state(state, copies)
        try:
            optimizer.eval()
        finally:
            move_state(state, {copy: each for each, copy in copies.items()})
            for group, values in zip(groups, entries, strict=True):
                group["params"] = values["params"]
        for parameter, weight in zip(parameters, trained, strict=True):
            parameter.data = copies.pop(parameter).data.to(weight.dtype)
        yield
    finally:
        for parameter, weight in zip(parameters, trained, strict=True):
            parameter.data = weight
        for group, values in zip(groups, entries, strict=True):
            group.update(values)


def _copy(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)


def move_state(state: Any, owners: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Give the state of each parameter to another one."""
    for old, new in owners.items():
        if old in state:
            state[new] = state.pop(old)

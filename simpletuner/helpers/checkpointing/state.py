"""The state of a run that must survive a restart, listed once, saved exactly and without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from simpletuner.helpers.adapters.sharding import distribute_like, full_tensor, is_dtensor
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.errors import CheckpointError, SimpleTunerError
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, ADAPTER_STATE_FILE, COUNTERS_FILE, OPTIMIZER_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from simpletuner.helpers.adapters.adapter import Adapter
    from simpletuner.helpers.checkpointing.progress import Progress


# The number of the operating system's error, which safetensors has only in its text.
_OS_ERROR = re.compile(r"os error (\d+)")


@dataclass(kw_only=True, slots=True)
class RunState:
    """The adapter, its optimiser, the counters and, under fp16, the gradient scaler.

    The learning rate and every random stream are functions of the counters and need no state.
    """

    adapter: Adapter
    optimizer: Optimizer
    progress: Progress
    metadata: Mapping[str, str]
    """Of the adapter file, about the run."""
    scaler: torch.amp.GradScaler | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the adapter is sharded over the processes (FSDP), so that all of them must save."""
        return any(is_dtensor(parameter) for parameter in self.adapter.parameters())

    @property
    def num_bytes(self) -> int:
        """Size of the tensors that `save` writes; those of the adapter are in two files."""
        adapter = sum(weight.numel() * weight.element_size() for weight in self.adapter.parameters())
        values = (value for state in self.optimizer.state.values() for value in state.values())
        return 2 * adapter + sum(
            value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)
        )

    def save(self, folder: Path) -> None:
        """Write the state and the adapter file into an existing folder.

        Raises:
            CheckpointError: A tensor file cannot be written.
            OSError: The disk is full.
        """
        tensors, numbers = optimizer_state(self.optimizer)
        _save_tensors(self.adapter.state_dict(), folder / ADAPTER_STATE_FILE)
        _save_tensors(tensors, folder / OPTIMIZER_FILE)
        write_json(folder / COUNTERS_FILE, {**self._counters(), "optimizer": numbers})
        self.save_adapter(folder / ADAPTER_FILE)

    def save_adapter(self, file: Path) -> None:
        """Write the adapter file, with the metadata and the number of steps in its header."""
        self.adapter.save(file, metadata={**self.metadata, "steps": str(self.progress.step)})

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            CheckpointError: A file is missing, damaged, or does not fit this run.
        """
        try:
            counters = json.loads((folder / COUNTERS_FILE).read_bytes())
            self.adapter.load_state_dict(load_file(folder / ADAPTER_STATE_FILE))
            # Copies: the optimiser keeps them, and Windows removes no file that is mapped into memory.
            tensors = {name: value.clone() for name, value in load_file(folder / OPTIMIZER_FILE).items()}
            load_optimizer_state(self.optimizer, tensors, numbers=counters["optimizer"])
            self.progress.load_state_dict(counters["progress"])
            if self.scaler is not None and counters["scaler"] is not None:
                self.scaler.load_state_dict(counters["scaler"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} cannot be loaded: {type(error).__name__}: {error}. "
                "Name another checkpoint in resume_from_checkpoint, or move this one away."
            ) from error
        except SimpleTunerError as error:
            raise CheckpointError(
                f"{folder} cannot be loaded: {error} "
                "Name another checkpoint in resume_from_checkpoint, or move this one away."
            ) from error

    def digest(self) -> str:
        """SHA-256 of the state; equal digests mean bitwise equal runs."""
        tensors, numbers = optimizer_state(self.optimizer)
        digest = hashlib.sha256()
        for owner, named in (("adapter", self.adapter.state_dict()), ("optimizer", tensors)):
            for name in sorted(named):
                tensor = named[name].detach().cpu().contiguous()
                digest.update(f"{owner}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        counters = {**self._counters(), "optimizer": numbers}
        digest.update(json.dumps(counters, sort_keys=True).encode())
        return digest.hexdigest()

    def _counters(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"progress": self.progress.state_dict(), "scaler": scaler}


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into named tensors and JSON numbers; `load_optimizer_state` joins them."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = full_tensor(value)
            elif value is not None:
                numbers.setdefault(str(index), {})[name] = value
    groups = [_adapted(group) for group in state["param_groups"]]
    return tensors, {"state": numbers, "groups": groups, "tensors": sorted(tensors)}


def load_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], *, numbers: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state` returned into an optimiser; its configuration stays.

    Raises:
        CheckpointError: A tensor is missing, belongs to no parameter, has another shape, or is not finite.
    """
    missing = sorted({*numbers.get("tensors", ())} - {*tensors})  # earlier versions did not list them
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the optimiser state are missing, first {missing[0]}."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in numbers["state"].items()
    }
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        _check_tensor(key, tensor, parameters=parameters)
        own = tensor if tensor.numel() == 1 else distribute_like(tensor, like=parameters[int(index)])
        state.setdefault(int(index), {})[name] = own
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, numbers["groups"], strict=True):
        group.update(saved)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_tensor(key: str, tensor: Tensor, *, parameters: list[nn.Parameter]) -> None:
    index = int(key.partition(".")[0])
    if index >= len(parameters):
        raise CheckpointError(f"Optimiser state {key} belongs to none of the {len(parameters)} parameters.")
    if tensor.numel() not in (1, parameters[index].numel()):
        shape = tuple(parameters[index].shape)
        raise CheckpointError(f"Optimiser state {key} does not fit its parameter of shape {shape}.")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"Optimiser state {key} is not finite.")


def _adapted(group: Mapping[str, Any]) -> dict[str, float]:
    # Everything else in a parameter group is configuration.
    names = [name for record in OPTIMIZERS.values() for name in record.group_state]
    values = {name: group[name] for name in names if name in group}
    return {
        name: value.item() if isinstance(value, torch.Tensor) else value for name, value in values.items()
    }


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # safetensors refuses views, which share storage, and writes from the host.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(copies, path)
        # safetensors makes files for their owner alone; the folder has the mode that the umask gives.
        path.chmod(path.parent.stat().st_mode & 0o666)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise CheckpointError(f"{path} cannot be written: {error}. Earlier checkpoints are kept.") from error

"""The state of a run that must survive a restart, listed once, saved exactly and without pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from simpletuner.helpers.adapters.sharding import is_dtensor
from simpletuner.helpers.checkpointing.optimizer_state import (
    load_optimizer_state,
    num_state_bytes,
    optimizer_state,
)
from simpletuner.helpers.errors import CheckpointError, SimpleTunerError
from simpletuner.helpers.io.atomic import publish_folder, write_json
from simpletuner.helpers.io.run_folder import (
    ADAPTER_STATE_FILE,
    COUNTERS_FILE,
    EMA_STATE_FILE,
    OPTIMIZER_FILE,
)
from simpletuner.helpers.io.safetensors_file import save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from simpletuner.helpers.adapters.ema import Ema
    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.checkpointing.progress import Progress


logger = logging.getLogger(__name__)

WEIGHTS_KEY = "adapter_weights"
"""In the header of the adapter files of a run with an EMA: plain or ema."""
# The number of the operating system's error, which safetensors has only in its text.
_OS_ERROR = re.compile(r"os error (\d+)")


@dataclass(kw_only=True, slots=True)
class RunState:
    """What is trained, its optimiser, the counters and, where there is one, the EMA and the gradient scaler.

    The learning rate and every random stream are functions of the counters and need no state.
    """

    trainable: Trainable
    optimizer: Optimizer
    progress: Progress
    metadata: Mapping[str, str]
    """Of the adapter file, about the run."""
    scaler: torch.amp.GradScaler | None = None
    averages: Callable[[], AbstractContextManager[None]] = nullcontext
    """The context in which the adapter has the weights for use, which its file holds."""
    ema: Ema | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over the processes (FSDP), so that all of them must save."""
        return any(is_dtensor(parameter) for parameter in self.trainable.parameters())

    @property
    def num_bytes(self) -> int:
        """Size of the tensors that `save` writes; adapter and EMA are each in two files, a model in one."""
        copies = 1 if self.trainable.is_model else 2
        ema = 0 if self.ema is None else self.ema.num_bytes
        return copies * (self.trainable.num_bytes + ema) + num_state_bytes(self.optimizer)

    def check_optimizer(self) -> None:
        """Check that a checkpoint can hold the optimiser's state; every process of a sharded run calls it.

        Raises:
            CheckpointError: It holds a value that cannot be saved.
        """
        optimizer_state(self.optimizer)

    def save(self, folder: Path) -> None:
        """Write the state and the files for use into an existing folder; a whole model's folder is both.

        Raises:
            CheckpointError: A tensor file cannot be written.
            OSError: The disk is full.
        """
        tensors, numbers = optimizer_state(self.optimizer)
        _save_tensors(tensors, folder / OPTIMIZER_FILE)
        if self.ema is not None:
            _save_tensors(self.ema.tensors(), folder / EMA_STATE_FILE)
        write_json(folder / COUNTERS_FILE, {**self._counters(), "optimizer": numbers})
        if self.trainable.is_model:
            self._save(folder / self.trainable.file_names[0])
        else:
            _save_tensors(self.trainable.state_dict(), folder / ADAPTER_STATE_FILE)
            self.save_weights(folder)

    def save_weights(self, folder: Path) -> list[Path]:
        """Write the weights for use, with an EMA twice; ema_adapter_file says which are the average.

        The headers have the metadata and the number of steps.

        Returns:
            The files, or the folders of a whole model.
        """
        main, second = (folder / name for name in self.trainable.file_names)
        plain = second if self.ema is not None and self.ema.is_main else main
        named = {} if self.ema is None else {WEIGHTS_KEY: "plain"}
        with self.averages():
            self._publish(plain, named)
        if self.ema is None:
            return [main]
        named = {WEIGHTS_KEY: "ema", "ema_decay": str(self.ema.config.ema_decay)}
        with self.ema.weights():
            self._publish(main if plain == second else second, named)
        return [main, second]

    def _publish(self, path: Path, metadata: Mapping[str, str]) -> None:
        with publish_folder(path) if self.trainable.is_model else nullcontext(path) as target:
            self._save(target, metadata)

    def _save(self, path: Path, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
        known = {**self.metadata, "steps": str(self.progress.step)}
        try:
            self.trainable.save(path, metadata=known | dict(metadata))
        except SafetensorError as error:
            raise _not_written(path, error) from error

    def _weights_in(self, folder: Path) -> dict[str, Tensor]:
        """The training state in a checkpoint."""
        if not self.trainable.is_model:
            return load_file(folder / ADAPTER_STATE_FILE)
        files = sorted((folder / self.trainable.file_names[0]).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            CheckpointError: A file is missing, damaged, or does not fit this run.
        """
        try:
            counters = json.loads((folder / COUNTERS_FILE).read_bytes())
            self.trainable.load_state_dict(self._weights_in(folder))
            # Copies: the optimiser keeps them, and Windows removes no file that is mapped into memory.
            tensors = {name: value.clone() for name, value in load_file(folder / OPTIMIZER_FILE).items()}
            load_optimizer_state(self.optimizer, tensors, numbers=counters["optimizer"])
            self.progress.load_state_dict(counters["progress"])
            if self.scaler is not None and counters["scaler"] is not None:
                self.scaler.load_state_dict(counters["scaler"])
            if self.ema is not None:
                self._load_ema(self.ema, folder, counters)
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
        averages = {} if self.ema is None else self.ema.tensors()
        for owner, named in (
            ("adapter", self.trainable.state_dict()),
            ("optimizer", tensors),
            ("ema", averages),
        ):
            for name in sorted(named):
                tensor = _copy(named[name])
                digest.update(f"{owner}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        counters = {**self._counters(), "optimizer": numbers}
        digest.update(json.dumps(counters, sort_keys=True).encode())
        return digest.hexdigest()

    def _counters(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        counters = {"progress": self.progress.state_dict(), "scaler": scaler}
        return counters if self.ema is None else counters | {"ema": {"updates": self.ema.num_updates}}

    def _load_ema(self, ema: Ema, folder: Path, counters: Mapping[str, Any]) -> None:
        if "ema" in counters:
            ema.load(load_file(folder / EMA_STATE_FILE), num_updates=counters["ema"]["updates"])
        else:
            logger.info("%s has no EMA. It starts from the weights of that step.", folder.name)
            ema.restart()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # safetensors refuses views, which share storage, and writes from the host.
    copies = {name: _copy(tensor) for name, tensor in tensors.items()}
    try:
        save_tensors(copies, path)
    except SafetensorError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: SafetensorError) -> Exception:
    number = _OS_ERROR.search(str(error))
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return CheckpointError(f"{path} cannot be written: {error}. Earlier checkpoints are kept.")


def _copy(tensor: Tensor) -> Tensor:
    # Not contiguous(): a view of one element is contiguous whatever its stride.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

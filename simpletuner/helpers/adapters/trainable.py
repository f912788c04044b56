"""What one run trains, as the trainer sees it: parameters, state, files and strength."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from simpletuner.helpers.errors import AdapterError

FULL_STRENGTH = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float | None = None
    """At the full rate of the schedule; None for the run's learning_rate."""
    end_step: int | None = None
    """Optimiser steps after which they stay as they are; None for all steps of the run."""
    weight_decay: float | None = None
    """In place of the optimiser's."""


def one_group(name: str, parameters: list[nn.Parameter]) -> list[ParameterGroup]:
    """All parameters as one group at the run's learning rate."""
    return [ParameterGroup(name=name, parameters=parameters)]


class Trainable(ABC):
    """The trained part of one model."""

    algorithm: str
    """LyCORIS's name of an adapter's algorithm; "standard" for PEFT LoRA."""
    num_layers: int
    """Number of layers with trained weights."""
    is_model: bool = False
    """Whether `save` writes the folder of a model, which is the training state too."""

    @property
    def tlora_config(self) -> dict[str, int | float | str] | None:
        """Value of a pipeline's `_tlora_config`; None without a rank schedule."""
        return None

    @property
    @abstractmethod
    def file_names(self) -> tuple[str, str]:
        """Names of what `save` writes: the main weights, and the second ones of a run with an EMA."""

    @abstractmethod
    def groups(self) -> list[ParameterGroup]:
        """The trained parameters, in a fixed order of groups and in each of them."""

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters of all groups."""
        return [parameter for group in self.groups() for parameter in group.parameters]

    @property
    def num_bytes(self) -> int:
        """Size of what `state_dict` returns."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Set the rank mask of these timesteps, one per sample, for a forward and its backward.

        Raises:
            RuntimeError: A mask is still held for a backward that has not finished.
        """
        return nullcontext()

    def mean_active_rank(self, timesteps: Sequence[int]) -> float | None:
        """Mean active rank over these timesteps; None without a rank schedule."""
        return None

    @abstractmethod
    def set_strength(self, strength: float) -> None:
        """Scale what was trained; at 0 the model computes what the base model does, bit for bit."""

    def switched_off(self) -> AbstractContextManager[None]:
        """The base model in place of the trained one; afterwards the strength of training, 1."""
        return self.at_strength(0.0)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Scale what was trained for a forward and its backward, which may repeat the forward."""
        if strength == FULL_STRENGTH:
            yield
            return
        self.set_strength(strength)
        try:
            yield
        finally:
            self.set_strength(FULL_STRENGTH)

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The exact training state, for checkpoints."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """

    @abstractmethod
    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write the weights for use, with this metadata.

        Raises:
            AdapterError: A weight is not finite; nothing is written.
            StorageError: The file cannot be written.
        """


def refuse_other_state(state: Mapping[str, Tensor], *, own: Mapping[str, Tensor]) -> None:
    """Check that a training state has exactly these tensors.

    Raises:
        AdapterError: A tensor is missing, unknown or of another shape.
    """
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise AdapterError(
            f"The training state does not fit this adapter: {len(wrong)} tensors differ, first {wrong[0]}."
        )

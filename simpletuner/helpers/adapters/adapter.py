"""What the trainer asks of an adapter, whatever its algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from simpletuner.helpers.errors import AdapterError


class Adapter(ABC):
    """One adapter attached to one denoiser, reachable from that denoiser."""

    algorithm: str
    """Algorithm, in LyCORIS's names; "standard" for PEFT LoRA."""
    num_layers: int
    """Layers adapted."""

    @property
    def tlora_config(self) -> dict[str, int | float | str] | None:
        """What a pipeline needs as `_tlora_config`; None when the adapter has no rank schedule."""
        return None

    @property
    def lycoris_network(self) -> nn.Module | None:
        """The LyCORIS network, None for PEFT."""
        return None

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Open the ranks of these timesteps, one per sample, for a forward and its backward.

        Raises:
            RuntimeError: Ranks are still held for a backward that has not finished.
        """
        return nullcontext()

    def mean_active_rank(self, timesteps: Sequence[int]) -> float | None:
        """Mean number of open ranks over these timesteps; None when the adapter has no rank schedule."""
        return None

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order, float32."""

    @abstractmethod
    def set_strength(self, strength: float) -> None:
        """Scale the adapter's contribution; 0 gives the base model."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The exact training state, for checkpoints."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """

    @abstractmethod
    def init_from(self, file: Path) -> None:
        """Begin training at the adapter of a file instead of at zero.

        Raises:
            AdapterError: The file is not of this kind, or its layers are others.
        """

    @abstractmethod
    def save(self, file: Path, *, metadata: Mapping[str, str]) -> None:
        """Write the adapter for others to use, with these facts about its training in the header.

        Raises:
            AdapterError: A weight is not finite; nothing is written.
            StorageError: The file cannot be written.
        """

    @abstractmethod
    def detach(self) -> None:
        """Take the adapter off; the denoiser is bit-identical to what it was."""


def refuse_other_state(state: Mapping[str, Tensor], *, own: Mapping[str, Tensor]) -> None:
    """Check that a training state has an adapter's own tensors and no others.

    Raises:
        AdapterError: A tensor is missing, unknown or of another shape.
    """
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise AdapterError(
            f"The adapter state does not fit this adapter: {len(wrong)} tensors, first {wrong[0]}."
        )

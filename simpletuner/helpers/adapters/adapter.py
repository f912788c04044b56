"""The interface between the trainer and an adapter of any algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from simpletuner.helpers.errors import AdapterError

FULL_STRENGTH = 1.0


class Adapter(ABC):
    """One adapter attached to one denoiser, which contains the adapter's modules."""

    algorithm: str
    """LyCORIS's name of the algorithm; "standard" for PEFT LoRA."""
    num_layers: int
    """Number of adapted layers."""

    @property
    def tlora_config(self) -> dict[str, int | float | str] | None:
        """Value of a pipeline's `_tlora_config`; None for an adapter without a rank schedule."""
        return None

    @property
    def lycoris_network(self) -> nn.Module | None:
        """The LyCORIS network, None for PEFT."""
        return None

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Set the rank mask of these timesteps, one per sample, for a forward and its backward.

        Raises:
            RuntimeError: A mask is still held for a backward that has not finished.
        """
        return nullcontext()

    def mean_active_rank(self, timesteps: Sequence[int]) -> float | None:
        """Mean active rank over these timesteps; None for an adapter without a rank schedule."""
        return None

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, float32, in a fixed order."""

    @abstractmethod
    def set_strength(self, strength: float) -> None:
        """Scale the adapter's contribution; at 0 the layers compute what they do without it, bit for bit."""

    def switched_off(self) -> AbstractContextManager[None]:
        """The base model in place of the adapted one; afterwards the strength of training, 1."""
        return self.at_strength(0.0)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Scale the adapter's contribution for a forward and its backward, which may repeat the forward."""
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
    def init_from(self, file: Path) -> None:
        """Initialise the adapter from a file instead of at zero.

        Raises:
            AdapterError: The file's algorithm or layers differ.
        """

    @abstractmethod
    def save(self, file: Path, *, metadata: Mapping[str, str]) -> None:
        """Write the adapter file, with this metadata in its header.

        Raises:
            AdapterError: A weight is not finite; nothing is written.
            StorageError: The file cannot be written.
        """

    @abstractmethod
    def detach(self) -> None:
        """Remove the adapter; the denoiser becomes bit-identical to its original."""


def refuse_other_state(state: Mapping[str, Tensor], *, own: Mapping[str, Tensor]) -> None:
    """Check that a training state has exactly an adapter's tensors.

    Raises:
        AdapterError: A tensor is missing, unknown or of another shape.
    """
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise AdapterError(
            f"The training state does not fit this adapter: {len(wrong)} tensors differ, first {wrong[0]}."
        )

"""The interface between the trainer and an adapter of any algorithm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.trainable import ParameterGroup, Trainable, one_group
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, EMA_ADAPTER_FILE


class Adapter(Trainable):
    """One adapter attached to one denoiser, which contains the adapter's modules."""

    @property
    def lycoris_network(self) -> nn.Module | None:
        """The LyCORIS network, None for PEFT."""
        return None

    @property
    def file_names(self) -> tuple[str, str]:
        """The adapter files."""
        return ADAPTER_FILE, EMA_ADAPTER_FILE

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, float32, in a fixed order."""

    def groups(self) -> list[ParameterGroup]:
        """One group, at the run's learning rate."""
        return one_group("adapter", self.parameters())

    @abstractmethod
    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the adapter's file holds: tensors, and entries of the header beside those of the run."""

    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write `content` to a file.

        Raises:
            AdapterError: A weight is not finite, or the adapter cannot be written; no file is.
            StorageError: The file cannot be written.
        """
        tensors, header = self.content()
        adapter_file.write(path, tensors, metadata={**metadata, **header})

    @abstractmethod
    def init_from(self, file: Path) -> None:
        """Initialise the adapter from a file instead of at zero.

        Raises:
            AdapterError: The file's algorithm or layers differ.
        """

    @abstractmethod
    def detach(self) -> None:
        """Remove the adapter; the denoiser becomes bit-identical to its original."""

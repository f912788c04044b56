"""An exponential moving average (EMA) of trained weights.

    average <- d average + (1 - d) weight,    d = min(decay, (1 + n) / (10 + n)) after n updates

It starts at the weights before the first step. Of a T-LoRA the differences are averaged, not the sums.
Sources: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992); the warm-up is that of TensorFlow's
ExponentialMovingAverage with num_updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.adapters.sharding import distribute_like, gathered, join_part, own_part
from simpletuner.helpers.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.configuration.schema.ema import EmaConfig


def decay_after(num_updates: int, *, decay: float) -> float:
    """Share of the average that the next update keeps."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Ema:
    """The average of what a run trains, float32 whatever its dtype; of sharded weights, this process's part.

    Args:
        trainable: Its present weights are the start.
        config: Decay and interval.
        device: Where the average is kept.
    """

    def __init__(self, trainable: Trainable, config: EmaConfig, *, device: torch.device) -> None:
        self.config = config
        self._trainable, self._device = trainable, device
        self.num_updates = 0
        self._averages: list[Tensor] = []
        self.restart()

    @property
    def is_main(self) -> bool:
        """Whether the adapter file has the average, and the file beside it the trained weights."""
        return self.config.ema_adapter_file == "main"

    @property
    def num_bytes(self) -> int:
        """Size of the whole average."""
        return sum(parameter.numel() for parameter in self._trainable.parameters()) * torch.float32.itemsize

    def restart(self) -> None:
        """Start anew from the present weights."""
        self.num_updates = 0
        self._averages = [self._copied(weight) for weight in self._weights()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after an optimiser step into the average, if its number asks for it."""
        if step % self.config.ema_update_interval:
            return
        decay = decay_after(self.num_updates, decay=self.config.ema_decay)
        weights = self._weights()
        if all(
            weight.dtype == torch.float32 and weight.device.type == self._device.type for weight in weights
        ):
            torch._foreach_lerp_(self._averages, weights, 1.0 - decay)
        else:  # one after the other: copies of all weights of a whole model would need much memory
            for average, weight in zip(self._averages, weights, strict=True):
                average.lerp_(weight.to(self._device, torch.float32), 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The average in place of the trained weights, which come back bit for bit."""
        weights = self._weights()
        trained = [weight.clone() for weight in weights]
        try:
            self._set(weights, self._averages)
            yield
        finally:
            self._set(weights, trained)

    def tensors(self) -> dict[str, Tensor]:
        """The whole average by the index of its parameter, as `gathered` returns it."""
        pairs = zip(self._trainable.parameters(), self._averages, strict=True)
        joined = (join_part(average, like=parameter) for parameter, average in pairs)
        return gathered({str(index): average for index, average in enumerate(joined)})

    def load(self, tensors: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Load what `tensors` returned, and the number of updates; the configured decay stays.

        Raises:
            AdapterError: A tensor is missing, unknown, of another shape, or not finite.
        """
        parameters = self._trainable.parameters()
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = {str(index): tuple(parameter.shape) for index, parameter in enumerate(parameters)}
        if found != expected:
            raise AdapterError(
                f"The EMA has {len(found)} tensors, this run {len(expected)} parameters, or their shapes "
                "differ."
            )
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise AdapterError(f"Tensor {bad[0]} of the EMA is not finite.")
        self._averages = [
            self._copied(own_part(distribute_like(tensors[str(index)], like=parameter)))
            for index, parameter in enumerate(parameters)
        ]
        self.num_updates = num_updates

    def _weights(self) -> list[Tensor]:
        return [own_part(parameter.detach()) for parameter in self._trainable.parameters()]

    def _copied(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, torch.float32, copy=True)

    @staticmethod
    @torch.no_grad()
    def _set(weights: list[Tensor], values: list[Tensor]) -> None:
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)

"""One stage of making the embedded model: a training loop that can be stopped at any time and goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from simpletuner.helpers.io.atomic import write_bytes

logger = logging.getLogger(__name__)

LOG_INTERVAL = 100
WARMUP_STEPS = 100
DECAY_SHARE = 0.3
"""The last part of a stage, over which the learning rate falls to zero."""
EMA_DECAY = 0.999


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a stage trains, and how hard."""

    steps: int
    learning_rate: float
    save_interval: int = 250

    def rate_at(self, step: int) -> float:
        """Learning rate of one step: a short rise, a plateau, a straight fall to zero."""
        return self.learning_rate * min(
            1.0, (step + 1) / WARMUP_STEPS, (self.steps - step) / (DECAY_SHARE * self.steps)
        )


class Stage:
    """Modules in training, their moving average, and the file that holds both."""

    def __init__(self, modules: Sequence[nn.Module], *, schedule: Schedule, file: Path) -> None:
        """Start at step 0, or where the file says an earlier run came to."""
        self.parameters: list[nn.Parameter] = [each for module in modules for each in module.parameters()]
        self.schedule, self.file = schedule, file
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.seconds = 0, 0.0
        if file.is_file():
            self._load()

    def train(self, loss_of: Callable[[int], Tensor], *, every: Callable[[int], None]) -> None:
        """Train to the end of the schedule.

        Args:
            loss_of: The loss of one step; a function of the step's number, so that a resumed run draws what
                an uninterrupted one draws.
            every: Called after each step with the number of steps done.
        """
        recent = []
        while self.step < self.schedule.steps:
            started = perf_counter()
            recent.append(self._train_step(loss_of))
            self.seconds += perf_counter() - started
            if self.step % LOG_INTERVAL == 0:
                mean = sum(recent) / len(recent)
                logger.info("%s step %d, loss %.4f, %.0f s", self.file.stem, self.step, mean, self.seconds)
                recent.clear()
            if self.step % self.schedule.save_interval == 0 or self.step == self.schedule.steps:
                self._save()
            every(self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules carry their moving average inside."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(trained)

    def take_average(self) -> None:
        """Leave the modules with their moving average; training cannot go on from there."""
        self._set(self.averages)

    def _train_step(self, loss_of: Callable[[int], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step)
        loss = loss_of(self.step)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 9))
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)
        return float(loss.detach())

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def _save(self) -> None:
        state = {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        content = BytesIO()
        torch.save(state, content)
        write_bytes(self.file, content.getvalue())

    def _load(self) -> None:
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        self._set(state["parameters"])
        for average, value in zip(self.averages, state["averages"], strict=True):
            average.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("%s goes on from step %d.", self.file.stem, self.step)

"""One training stage of the embedded model: a loop that resumes after an interruption."""

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
"""Final share of the steps, in which the learning rate decays to zero."""
EMA_DECAY = 0.999


@dataclass(frozen=True, slots=True)
class Schedule:
    """Number of steps and learning rate of a stage."""

    steps: int
    learning_rate: float
    save_interval: int = 250

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warmup, constant, linear decay to zero."""
        return self.learning_rate * min(
            1.0, (step + 1) / WARMUP_STEPS, (self.steps - step) / (DECAY_SHARE * self.steps)
        )


class TrainStage:
    """Trains modules, keeps their EMA weights, and saves both in a file."""

    def __init__(self, modules: Sequence[nn.Module], *, schedule: Schedule, file: Path) -> None:
        """Start at step 0, or at the step stored in the file."""
        self.parameters: list[nn.Parameter] = [each for module in modules for each in module.parameters()]
        self.schedule, self.file = schedule, file
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.seconds = 0, 0.0
        if file.is_file():
            self._load()

    def train(self, loss_fn: Callable[[int], Tensor], *, after_step: Callable[[int], None]) -> None:
        """Train to the end of the schedule.

        Args:
            loss_fn: Loss of a step; it depends on the step number alone, so that a resumed run draws the same
                batches as an uninterrupted one.
            after_step: Called after each step with the number of finished steps.
        """
        recent = []
        while self.step < self.schedule.steps:
            started = perf_counter()
            recent.append(self._train_step(loss_fn))
            self.seconds += perf_counter() - started
            if self.step % LOG_INTERVAL == 0:
                mean = sum(recent) / len(recent)
                logger.info("%s step %d, loss %.4f, %.0f s", self.file.stem, self.step, mean, self.seconds)
                recent.clear()
            if self.step % self.schedule.save_interval == 0 or self.step == self.schedule.steps:
                self._save()
            after_step(self.step)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Swap the EMA weights into the modules inside the context."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.ema)
        try:
            yield
        finally:
            self._set(trained)

    def load_ema(self) -> None:
        """Load the EMA weights into the modules for good; training cannot continue after it."""
        self._set(self.ema)

    def _train_step(self, loss_fn: Callable[[int], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate_at(self.step)
        loss = loss_fn(self.step)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 9))
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)
        return float(loss.detach())

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def _save(self) -> None:
        state = {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "averages": self.ema,
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
        for average, value in zip(self.ema, state["averages"], strict=True):
            average.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("%s resumes at step %d.", self.file.stem, self.step)

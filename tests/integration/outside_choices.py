"""Records and implementations as a package of somebody else has them; test_outside_choices.py copies it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from simpletuner.helpers.choices.algorithms import ALGORITHMS, ARGUMENTS, Algorithm, Argument
from simpletuner.helpers.choices.captions import CAPTION_SOURCES, CaptionSource
from simpletuner.helpers.choices.losses import LOSSES
from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES, LrSchedule
from simpletuner.helpers.choices.optimizers import OPTIMIZERS, Optimizer
from simpletuner.helpers.choices.precisions import PRECISIONS, Precision
from simpletuner.helpers.choices.registry import Choice
from simpletuner.helpers.choices.samplers import SAMPLERS, Sampler
from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.data.captions import CaptionReader, Captions
from simpletuner.helpers.data.sources.base import FoundFile, read_bounded
from simpletuner.helpers.reporting.metrics import StepMetrics

STEPS_SAMPLED: list[float] = []


class Shrinking(TorchOptimizer):
    """Steps along the sign of the gradient, smaller by `decay` each time; the size is kept in the group.

    It counts the steps of each parameter in whole numbers.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, decay: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "size": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * group["lr"] * group["size"])
                    counts = self.state[parameter].setdefault("counts", torch.zeros(3, dtype=torch.int32))
                    counts += 1
            group["size"] *= group["decay"]


def stairs(progress: float, *, end: float) -> float:
    """The full rate in the first half of the run, `end` in the second."""
    return 1.0 if progress < 0.5 else end


def weighted_mae(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute error of each sample times its weight, [B]."""
    return (prediction - target).abs().flatten(1).mean(dim=1) * weight


class NotedEuler(EulerDiscreteScheduler):
    """Euler's method that notes its steps."""

    def step(self, output: Tensor, timestep: Tensor, *args: Any, **options: Any) -> Any:
        STEPS_SAMPLED.append(float(timestep))
        return super().step(output, timestep, *args, **options)


def rounded(layer: nn.Linear, device: torch.device) -> nn.Linear:
    """The layer with its weight rounded to sixteenths."""
    layer = layer.to(device)
    layer.weight.data = (layer.weight.data * 16).round() / 16
    return layer


class LoudLayer(LoConModule):  # type: ignore[misc]
    """LoRA times `gain`."""

    def __init__(self, *args: Any, gain: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = self.scale * gain


class JsonCaptions(CaptionReader):
    """The text of {"text": ...} in a .caption file beside an image."""

    def read(self, file: FoundFile) -> Captions:
        (caption,) = self.caption_files(file)
        return Captions(texts=(json.loads(read_bounded(caption, limit=1000))["text"],))


class Losses:
    """Writes the losses into one file."""

    def __init__(self, *, output_dir: Path, **_: object) -> None:
        self.file = output_dir / "losses.txt"

    def start(self) -> None:
        self.file.write_text("")

    def log(self, record: StepMetrics) -> None:
        with self.file.open("a") as file:
            file.write(f"{record.step} {record.loss}\n")

    def log_images(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Nothing."""

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


OPTIMIZERS.register(
    Optimizer(
        name="shrinking",
        summary="Smaller signs.",
        build="weavers:Shrinking",
        arguments={"decay": "number"},
        default_learning_rate=0.01,
    )
)
LR_SCHEDULES.register(
    LrSchedule(name="stairs", summary="One stair.", build="weavers:stairs", arguments=("end",))
)
LOSSES.register(Choice(name="l1", summary="Mean absolute error.", build="weavers:weighted_mae"))
SAMPLERS.register(
    Sampler(
        name="noted",
        summary="Euler's method.",
        schedulers={"diffusion": "weavers:NotedEuler"},
        families=("sdxl",),
    )
)
PRECISIONS.register(Precision(name="sixteenths", summary="Rounded.", build="weavers:rounded"))
ARGUMENTS["gain"] = Argument(type="count", description="Factor on the output.", aliases=("loudness",))
ALGORITHMS.register(
    Algorithm(
        name="loud",
        display_name="LouDRA",
        summary="LoRA times gain.",
        build="weavers:LoudLayer",
        arguments=frozenset({"gain"}),
        defaults={"linear_dim": 4, "linear_alpha": 4.0, "gain": 3},
        exports_to_comfyui=True,
    )
)
CAPTION_SOURCES.register(
    CaptionSource(
        name="braces",
        summary="A .caption file.",
        build="weavers:JsonCaptions",
        suffix=".caption",
        aliases=("js",),
    )
)
TRACKERS.register(Choice(name="losses", summary="A text file.", build="weavers:Losses"))

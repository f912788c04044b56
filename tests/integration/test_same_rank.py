"""The same rank at the same noise level: in the trainer, in its validation and in a pipeline on its own."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.flux_pipelines import tiny_flux
from tests.integration.tiny_runs import TLORA, TinyRun, tiny_model

pytestmark = pytest.mark.usefixtures("shared_caches")

SCHEDULE = RankSchedule(8, min_rank=2)
PICTURES = {
    "validation_disable": False,
    "validation_prompt": "a cat",
    "validation_num_inference_steps": 5,
    "validation_resolution": "64x64",
    "validation_step_interval": 0,
    "disable_benchmark": True,
}
SHIFTS: tuple[dict[str, object], ...] = (
    {},
    {"flow_schedule_shift": 3.0},
    {"flow_schedule_shift": 1.0},
    {"flow_schedule_auto_shift": True},
)


@dataclass(frozen=True)
class Case:
    """A run of one family, and where its pipeline's denoiser begins."""

    family: str
    model: Callable[[], Path]
    keys: dict[str, object]
    first_layer: str
    calls: int = 1
    """Of the denoiser at each step of a picture."""
    shifts_by_steps: bool = False
    """Whether the pipeline on its own shifts by the number of steps, which training does not know."""

    def __str__(self) -> str:
        return f"{self.family} {self.keys}"

    def run(self, folder: Path, **keys: object) -> TinyRun:
        model = {"model_family": self.family, "pretrained_model_name_or_path": str(self.model())}
        lycoris = {**TLORA, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}
        run = TinyRun(folder, lycoris=lycoris, keys={**model, **self.keys, **keys})
        return run


@functools.cache
def klein() -> Path:
    """A tiny Flux.2 Klein, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny_klein_"))
    save_tiny_flux2(folder, klein=True)
    return folder


@functools.cache
def dev() -> Path:
    """A tiny Flux.2 dev, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny_flux2_dev_"))
    save_tiny_flux2(folder, klein=False)
    return folder


CASES = [
    Case("sdxl", tiny_model, {}, "conv_in"),
    *(
        Case("sdxl", tiny_model, {"validation_noise_scheduler": name}, "conv_in")
        for name in ("heun", "unipc")
    ),
    *(Case("flux", tiny_flux, shift, "x_embedder") for shift in SHIFTS),
    Case("flux2", klein, {}, "x_embedder", calls=2, shifts_by_steps=True),
    Case("flux2", klein, {"flow_schedule_shift": 3.0}, "x_embedder", calls=2),
    Case("flux2", dev, {}, "x_embedder", shifts_by_steps=True),
]


def watch_ranks(denoiser: Any, first_layer: str, group: int) -> list[tuple[int, ...]]:
    """The open ranks of each sample at each call of a denoiser, as they come."""
    seen: list[tuple[int, ...]] = []

    def look(*_: object) -> None:
        current = mask.current_mask(group, SCHEDULE.max_rank)
        assert current is not None
        seen.append(tuple(int(rank) for rank in current.sum(dim=-1)))

    denoiser.get_submodule(first_layer).register_forward_hook(look)
    return seen


def watch_steps(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The timestep, floored, of each step that a scheduler takes."""
    seen: list[int] = []
    step = scheduler.step

    def watched(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(int(timestep))
        return step(output, timestep, *args, **kwargs)

    monkeypatch.setattr(scheduler, "step", watched)
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trainer_validation_and_pipeline_open_the_same_rank_at_the_same_noise_level(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = case.run(tmp_path, train_batch_size=3, max_train_steps=1, **PICTURES)
    with run.trainer() as trainer:
        ranks = watch_ranks(trainer.denoiser, case.first_layer, trainer.trainable.group)  # type: ignore[attr-defined]
        in_training = trained_levels(trainer, monkeypatch)
        assert ranks == [tuple(SCHEDULE.rank_at(timestep) for timestep in in_training)]
        assert len(set(ranks[0])) > 1
        ranks.clear()
        in_validation = validated_levels(trainer, monkeypatch)
        assert ranks == ranks_of(in_validation, case)
        trainer.trainable.save(tmp_path / ADAPTER_FILE, metadata={})
    pipeline = diffusers.DiffusionPipeline.from_pretrained(case.model())
    pipeline.set_progress_bar_config(disable=True)
    adapter = load_into_pipeline(pipeline, tmp_path / ADAPTER_FILE)
    denoiser = pipeline.unet if case.family == "sdxl" else pipeline.transformer
    if case.keys.get("flow_schedule_shift"):
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, use_dynamic_shifting=False, shift=case.keys["flow_schedule_shift"]
        )
    ranks = watch_ranks(denoiser, case.first_layer, adapter.group)
    alone = watch_steps(pipeline.scheduler, monkeypatch)
    pipeline(prompt="a cat", height=64, width=64, num_inference_steps=5, output_type="latent")
    assert ranks == ranks_of(alone, case)
    # The pipeline on its own has the model's scheduler.
    if "validation_noise_scheduler" not in case.keys and not case.shifts_by_steps:
        assert np.abs(np.subtract(alone, in_validation)).max() <= 1, "another shift than in validation"


def ranks_of(timesteps: list[int], case: Case) -> list[tuple[int, ...]]:
    """What each denoiser call should open at these steps."""
    return [(SCHEDULE.rank_at(timestep),) for timestep in timesteps for _ in range(case.calls)]


def trained_levels(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The timesteps of one training step, which are those that the denoiser is called with."""
    noised_batches: list[NoisyBatch] = []
    times: list[torch.Tensor] = []
    add_noise = trainer.family.add_noise

    def watched(*args: Any, **kwargs: Any) -> NoisyBatch:
        noised_batches.append(add_noise(*args, **kwargs))
        return noised_batches[-1]

    def look(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        times.append(kwargs["timestep"] if "timestep" in kwargs else args[1])

    monkeypatch.setattr(trainer.family, "add_noise", watched)
    hook = trainer.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    batch = next(iter(trainer.data.batches(start=0)))
    trainer.train_step(batch.to(trainer.accelerator.device))
    hook.remove()
    (noisy,), (time,) = noised_batches, times
    if noisy.sigmas is None:
        assert time.tolist() == list(noisy.timesteps)
    else:
        torch.testing.assert_close(time, torch.tensor(noisy.sigmas))
        assert noisy.timesteps == tuple(int(torch.tensor(sigma) * 1000) for sigma in noisy.sigmas)
    return noisy.timesteps


def validated_levels(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The timesteps of the steps that the run's own validation takes."""
    steps: list[int] = []
    make_pipeline = trainer.family.make_pipeline

    def watched(*args: Any, **kwargs: Any) -> Any:
        pipeline = make_pipeline(*args, **kwargs)
        nonlocal steps
        steps = watch_steps(pipeline.scheduler, monkeypatch)
        return pipeline

    monkeypatch.setattr(trainer.family, "make_pipeline", watched)
    trainer.validation.run(0)
    assert trainer.validation.grid_file(0).exists()
    return steps

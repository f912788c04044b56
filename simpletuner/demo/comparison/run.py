"""Trains and measures the runs of a benchmark; a later start does only the missing runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.demo.comparison.concepts import CONCEPTS
from simpletuner.demo.comparison.plan import PLANS, Plan, Run, timestep_weights
from simpletuner.demo.evaluate import Sampling
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, checkpoint_folder
from simpletuner.helpers.models import registry

if TYPE_CHECKING:
    from simpletuner.demo.comparison.measure import AdapterEvaluator
    from simpletuner.helpers.adapters.files.foreign.translation import ScheduleOptions

logger = logging.getLogger(__name__)

MODEL = Path(__file__).parents[1] / "sdxl"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A plan, its output folder and its model."""

    folder: Path
    model: Path
    """Folder of the embedded model."""
    plan: Plan

    @property
    def results(self) -> Path:
        """Folder with one JSON file for each finished run."""
        return self.folder / "results"

    def result_file(self, run: Run) -> Path:
        """File with the measurements of a finished run."""
        return self.results / f"{run.name}.json"

    def fingerprint(self, run: object) -> str:
        """Hash of the model's weights and of all settings that change a run's measurements."""
        plan = self.plan
        digest = hashlib.sha256(repr((run, plan.steps, plan.prompts, plan.neutral)).encode())
        digest.update(repr((plan.sampling_steps, plan.guidance, plan.learning_rate, plan.batch)).encode())
        for file in sorted(self.model.rglob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def load(self, run: Run) -> dict[str, Any] | None:
        """Measurements of a finished run; None if missing or from another plan or model."""
        try:
            record: dict[str, Any] = json.loads(self.result_file(run).read_bytes())
        except (OSError, ValueError):
            return None
        return record if record.get("fingerprint") == self.fingerprint(run) else None


def benchmark_for(folder: Path, *, size: str) -> Benchmark:
    """The benchmark of a size, a key of PLANS, on the embedded model."""
    return Benchmark(folder, MODEL, PLANS[size])


def compare(benchmark: Benchmark, *, workers: int) -> None:
    """Do the missing runs of the plan in `workers` parallel processes, each with one thread.

    Raises:
        SimpleTunerError: A run failed; finished runs stay.
    """
    missing = [run for run in benchmark.plan.runs() if benchmark.load(run) is None]
    num_all = sum(1 for _ in benchmark.plan.runs())
    logger.info("%d of %d runs are to be done, %d in parallel.", len(missing), num_all, workers)
    started = time.perf_counter()
    for done, (run, seconds) in enumerate(_run_all(benchmark, missing, workers=workers), start=1):
        left = _format_duration((time.perf_counter() - started) / done * (len(missing) - done))
        logger.info("%d of %d: %s, %.0f s. About %s left.", done, len(missing), run.name, seconds, left)


def _run_all(benchmark: Benchmark, runs: list[Run], *, workers: int) -> Iterator[tuple[Run, float]]:
    if not runs:
        return
    # Spawned, because torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(train_and_measure, benchmark, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import torch  # the parent process needs none

    torch.set_num_threads(1)
    logging.getLogger("simpletuner").setLevel(logging.WARNING)


def train_and_measure(benchmark: Benchmark, run: Run) -> float:
    """Train and measure one run and write its result; returns the seconds."""
    import torch

    from simpletuner.demo.comparison.measure import AdapterEvaluator
    from simpletuner.helpers.models.sdxl.embedded import load_pipeline

    started = time.perf_counter()
    folder = benchmark.folder / "runs" / run.name
    files = train(benchmark, run, folder=folder)
    trained_s = time.perf_counter() - started
    plan, concept = benchmark.plan, CONCEPTS[run.concept]
    bench = AdapterEvaluator(
        load_pipeline(benchmark.model, device=torch.device("cpu")),
        num_views=plan.prompts,
        num_neutral=plan.neutral,
        sampling=Sampling(steps=plan.sampling_steps, guidance=plan.guidance),
    )
    base = _base_point(benchmark, bench, run)

    def points(schedule: ScheduleOptions | None = None) -> list[dict[str, Any]]:
        return [base] + [
            {"step": step} | asdict(bench.measure(file, concept=concept, seed=run.seed, schedule=schedule))
            for step, file in files.items()
        ]

    measured = {
        "points": points(),
        "unmasked": points({"min_rank": run.rank}) if plan.is_measured_unmasked(run) else [],
    }
    write_json(
        benchmark.result_file(run),
        {
            "fingerprint": benchmark.fingerprint(run),
            "run": asdict(run),
            "training_seconds": round(trained_s, 1),
            "seconds": round(time.perf_counter() - started, 1),
            **measured,
        },
    )
    shutil.rmtree(folder)
    return time.perf_counter() - started


def _base_point(benchmark: Benchmark, bench: AdapterEvaluator, run: Run) -> dict[str, Any]:
    """Measurements of the base model, shared by all contenders of a concept and seed."""
    file = benchmark.results / f"base_{run.concept}_seed-{run.seed}.json"
    fingerprint = benchmark.fingerprint((run.concept, run.seed))
    if file.exists() and (record := json.loads(file.read_bytes()))["fingerprint"] == fingerprint:
        point: dict[str, Any] = record["point"]
        return point
    point = {"step": 0, **asdict(bench.measure(None, concept=CONCEPTS[run.concept], seed=run.seed))}
    write_json(file, {"fingerprint": fingerprint, "point": point})
    return point


def train(benchmark: Benchmark, run: Run, *, folder: Path) -> dict[int, Path]:
    """Train a run with the trainer; returns the adapter file of each step to measure.

    Raises:
        SimpleTunerError: The run failed, or a signal stopped it.
    """
    from simpletuner.demo.comparison.timesteps import with_weighted_timesteps
    from simpletuner.helpers.training.build import build_trainer
    from simpletuner.helpers.training.trainer import Trainer

    steps = benchmark.plan.steps
    CONCEPTS[run.concept].save_dataset(folder / "picture")
    write_json(folder / "config.json", run_config(benchmark, run, folder=folder))
    trainer = build_trainer(load_config(folder / "config.json", families=registry.specs()))
    if run.contender.weighted and isinstance(trainer, Trainer):
        trainer = with_weighted_timesteps(trainer, timestep_weights(run.rank))
    if trainer.run() != 0:
        raise SimpleTunerError(f"A signal stopped {run.name}. The same command continues it.")
    return {step: checkpoint_folder(folder / "output", step) / ADAPTER_FILE for step in steps}


def run_config(benchmark: Benchmark, run: Run, *, folder: Path) -> dict[str, Any]:
    """The config.json of a run, with the LyCORIS and the dataset JSON inline."""
    steps = benchmark.plan.steps
    return {
        "model_family": "sdxl",
        "model_type": "lora",
        "pretrained_model_name_or_path": str(benchmark.model.resolve()),
        "lora_type": "lycoris",
        "lycoris_config": run.contender.lycoris(run.rank),
        "data_backend_config": [
            {
                "id": run.concept,
                "type": "local",
                "instance_data_dir": str((folder / "picture").resolve()),
                "caption_strategy": "textfile",
            }
        ],
        "output_dir": str((folder / "output").resolve()),
        "cache_dir_vae": str((folder / "cache" / "vae").resolve()),
        "cache_dir_text": str((folder / "cache" / "text").resolve()),
        "resolution": 64,
        "resolution_type": "pixel",
        "aspect_bucket_alignment": 8,
        "max_train_steps": steps[-1],
        "train_batch_size": benchmark.plan.batch,
        "gradient_checkpointing": False,
        "learning_rate": benchmark.plan.learning_rate,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
        "seed": run.seed,
        "checkpoint_step_interval": _divisor(steps),
        "checkpoints_total_limit": None,
        "validation_disable": True,
    }


def _divisor(steps: tuple[int, ...]) -> int:
    """The largest interval that divides every step."""
    return math.gcd(*steps)


def _format_duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"

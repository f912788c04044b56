"""Trains and measures one contender, or a whole plan of them, going on where an earlier start stopped."""

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
from simpletuner.demo.comparison.plan import PLANS, Plan, Run
from simpletuner.demo.evaluate import Sampling
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, checkpoint_folder
from simpletuner.helpers.models import registry

if TYPE_CHECKING:
    from simpletuner.demo.comparison.measure import Bench

logger = logging.getLogger(__name__)

MODEL = Path(__file__).parents[1] / "sdxl"


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a comparison lies and what it is made on."""

    folder: Path
    model: Path
    """Folder of the embedded model."""
    plan: Plan

    @property
    def results(self) -> Path:
        """Folder of the finished runs, one json each."""
        return self.folder / "results"

    def result_file(self, run: Run) -> Path:
        """Where the measurements of a run lie once it is finished."""
        return self.results / f"{run.name}.json"

    def fingerprint(self, what: object) -> str:
        """Depends on the model's weights and on everything that decides the numbers of a run."""
        plan = self.plan
        digest = hashlib.sha256(repr((what, plan.steps, plan.prompts, plan.neutral)).encode())
        digest.update(repr((plan.sampling_steps, plan.guidance, plan.learning_rate, plan.batch)).encode())
        for file in sorted(self.model.rglob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def load(self, run: Run) -> dict[str, Any] | None:
        """The finished measurements of a run; None if there are none or they are of another plan or model."""
        try:
            record: dict[str, Any] = json.loads(self.result_file(run).read_bytes())
        except (OSError, ValueError):
            return None
        return record if record.get("fingerprint") == self.fingerprint(run) else None


def workplace_for(folder: Path, *, size: str) -> Workplace:
    """A comparison of a size that is a key of PLANS, on the embedded model."""
    return Workplace(folder, MODEL, PLANS[size])


def compare(workplace: Workplace, *, workers: int) -> None:
    """Finish every run of the plan that is not finished yet.

    Args:
        workplace: What is compared and where.
        workers: Processes side by side, each with one thread.

    Raises:
        SimpleTunerError: A run failed; those that are finished stay.
    """
    missing = [run for run in workplace.plan.runs() if workplace.load(run) is None]
    num_all = sum(1 for _ in workplace.plan.runs())
    logger.info("%d of %d runs are to be done, %d at a time.", len(missing), num_all, workers)
    started = time.perf_counter()
    for done, (run, seconds) in enumerate(_run_all(workplace, missing, workers=workers), start=1):
        left_s = (time.perf_counter() - started) / done * (len(missing) - done)
        logger.info(
            "%d of %d: %s, %.0f s. About %s left.", done, len(missing), run.name, seconds, _say(left_s)
        )


def _run_all(workplace: Workplace, runs: list[Run], *, workers: int) -> Iterator[tuple[Run, float]]:
    if not runs:
        return
    # Spawned: threads of a parent's torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(finish, workplace, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import torch  # the parent needs none

    torch.set_num_threads(1)
    logging.getLogger("simpletuner").setLevel(logging.WARNING)


def finish(workplace: Workplace, run: Run) -> float:
    """Train and measure one run, and write its result; the seconds that this took."""
    import torch

    from simpletuner.demo.comparison.measure import Bench
    from simpletuner.helpers.models.sdxl.embedded import load_pipeline

    started = time.perf_counter()
    folder = workplace.folder / "runs" / run.name
    files = train(workplace, run, folder=folder)
    trained_s = time.perf_counter() - started
    plan, concept = workplace.plan, CONCEPTS[run.concept]
    bench = Bench(
        load_pipeline(workplace.model, device=torch.device("cpu")),
        num_views=plan.prompts,
        num_neutral=plan.neutral,
        sampling=Sampling(steps=plan.sampling_steps, guidance=plan.guidance),
    )
    points = [_base_point(workplace, bench, run)]
    points += [
        {"step": step, **asdict(bench.measure(file, concept=concept, seed=run.seed))}
        for step, file in files.items()
    ]
    write_json(
        workplace.result_file(run),
        {
            "fingerprint": workplace.fingerprint(run),
            "run": asdict(run),
            "training_seconds": round(trained_s, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "points": points,
        },
    )
    shutil.rmtree(folder)
    return time.perf_counter() - started


def _base_point(workplace: Workplace, bench: Bench, run: Run) -> dict[str, Any]:
    """What the model without an adapter measures, made once for all contenders of a concept and seed."""
    file = workplace.results / f"base_{run.concept}_seed-{run.seed}.json"
    fingerprint = workplace.fingerprint((run.concept, run.seed))
    if file.exists() and (record := json.loads(file.read_bytes()))["fingerprint"] == fingerprint:
        point: dict[str, Any] = record["point"]
        return point
    point = {"step": 0, **asdict(bench.measure(None, concept=CONCEPTS[run.concept], seed=run.seed))}
    write_json(file, {"fingerprint": fingerprint, "point": point})
    return point


def train(workplace: Workplace, run: Run, *, folder: Path) -> dict[int, Path]:
    """Train through the trainer itself; the adapter's file after each step at which it is measured.

    Raises:
        SimpleTunerError: The run failed, or was stopped by a signal.
    """
    from simpletuner.helpers.training.build import build_trainer

    steps = workplace.plan.steps
    CONCEPTS[run.concept].save_picture(folder / "picture")
    write_json(folder / "config.json", settings(workplace, run, folder=folder))
    code = build_trainer(load_config(folder / "config.json", families=registry.specs())).run()
    if code != 0:
        raise SimpleTunerError(f"{run.name} was stopped. The same command goes on from here.")
    return {step: checkpoint_folder(folder / "output", step) / ADAPTER_FILE for step in steps}


def settings(workplace: Workplace, run: Run, *, folder: Path) -> dict[str, Any]:
    """The config.json of a run, its lycoris json and its dataset json inside."""
    steps = workplace.plan.steps
    return {
        "model_family": "sdxl",
        "model_type": "lora",
        "pretrained_model_name_or_path": str(workplace.model.resolve()),
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
        "train_batch_size": workplace.plan.batch,
        "gradient_checkpointing": False,
        "learning_rate": workplace.plan.learning_rate,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
        "seed": run.seed,
        "checkpoint_step_interval": _divisor(steps),
        "checkpoints_total_limit": None,
        "validation_disable": True,
    }


def _divisor(steps: tuple[int, ...]) -> int:
    """The largest interval that meets every step."""
    return math.gcd(*steps)


def _say(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"

"""B15: the EMA against the trained weights of the same runs, on the embedded model.

    python tests/benchmarks/bench_ema.py [--folder FOLDER] [--seeds 3] [--steps 320] [--quick]

Each run trains a T-LoRA of rank 16 on one drawing with the settings of `simpletuner benchmark tlora` and the
default ema_decay, with every concept and each seed. Both adapter files are measured as that benchmark does,
with the same noise. The intervals of the paired differences are bootstrapped over the runs. A later start
trains only what is missing in FOLDER. --quick is a smoke test.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from simpletuner.demo.comparison import measure
from simpletuner.demo.comparison.concepts import CONCEPTS
from simpletuner.demo.comparison.measure import AdapterEvaluator
from simpletuner.demo.comparison.plan import CONTENDERS, STANDARD, Run
from simpletuner.demo.comparison.run import MODEL, Benchmark, run_config
from simpletuner.demo.comparison.statistics import Estimate, difference, estimate
from simpletuner.demo.evaluate import Sampling
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, EMA_ADAPTER_FILE, checkpoint_folder
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.sdxl.embedded import load_pipeline
from simpletuner.helpers.training.build import build_trainer

RANK = 16
CONTENDER = CONTENDERS[-1]
FILES = {"plain": ADAPTER_FILE, "ema": EMA_ADAPTER_FILE}
SHOWN = ("concept", "concept_in_view", "alignment", "background_leaks")
"""Measures of the images; the held-out loss of each noise band comes after them."""


def main() -> None:
    """Train and measure what is missing, and print one row for each measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/benchmark-ema"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, concepts = replace(STANDARD, steps=(options.steps // 2, options.steps)), list(CONCEPTS)
    if options.quick:
        plan = replace(plan, steps=(1, 2), prompts=1, neutral=1, sampling_steps=2)
        concepts, options.seeds, measure.NOISES_PER_VIEW = concepts[:1], 1, 1
    with TemporaryDirectory() as scratch:
        benchmark = Benchmark(Path(scratch) if options.quick else options.folder, MODEL, plan)
        runs = [
            Run(CONTENDER, RANK, concept, seed) for seed, concept in product(range(options.seeds), concepts)
        ]
        records = [record_of(benchmark, run) for run in runs]
    print(
        f"{len(runs)} runs\n\n| step | measure | trained weights | EMA | difference |\n|---|---|---|---|---|"
    )
    for step in map(str, plan.steps):
        for name in (*SHOWN, *(f"loss {band}" for band in records[0][step]["plain"]["loss"])):
            plain, ema = (np.array([value(each[step][which], name) for each in records]) for which in FILES)
            row = (estimate(plain), estimate(ema), difference(ema, plain))
            print(f"| {step} | {name} | {' | '.join(map(shown, row))} |", flush=True)


def record_of(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    """Step -> which weights -> their measures; trained now unless an earlier start has done it."""
    folder = benchmark.folder / run.name
    file = folder / f"measures-{benchmark.plan.steps[-1]}.json"
    if not file.exists():
        CONCEPTS[run.concept].save_dataset(folder / "picture")
        config = run_config(benchmark, run, folder=folder) | {"use_ema": True}
        (folder / "config.json").write_text(json.dumps(config))
        build_trainer(load_config(folder / "config.json", families=registry.specs())).run()
        plan = benchmark.plan
        evaluator = AdapterEvaluator(
            load_pipeline(benchmark.model, device=torch.device("cpu")),
            num_views=plan.prompts,
            num_neutral=plan.neutral,
            sampling=Sampling(steps=plan.sampling_steps, guidance=plan.guidance),
        )
        measures = {
            str(step): {
                which: asdict(
                    evaluator.measure(
                        checkpoint_folder(folder / "output", step) / name,
                        concept=CONCEPTS[run.concept],
                        seed=run.seed,
                    )
                )
                for which, name in FILES.items()
            }
            for step in plan.steps
        }
        file.write_text(json.dumps(measures))
    record: dict[str, Any] = json.loads(file.read_bytes())
    return record


def value(measures: dict[str, Any], name: str) -> float:
    """A measure, or the loss of a band."""
    kind, _, band = name.partition(" ")
    found: float = measures["loss"][band] if kind == "loss" else measures[name]
    return found


def shown(found: Estimate) -> str:
    """A mean and its interval."""
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


if __name__ == "__main__":
    main()

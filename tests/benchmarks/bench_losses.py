"""B18: losses, weights and noise against the plain squared error, on the embedded model.

    python tests/benchmarks/bench_losses.py [--folder FOLDER] [--seeds 2] [--steps 60] [--quick]

Each run trains a LoRA of rank 8 on one drawing with the settings of `simpletuner benchmark tlora` and the
keys of one variant, with every concept and each seed, and is measured by that benchmark's held-out loss, a
squared error. The intervals of the paired differences are bootstrapped over the runs. A later start trains
only what is missing in FOLDER. --quick is a smoke test.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from simpletuner.demo.comparison import measure
from simpletuner.demo.comparison.concepts import CONCEPTS
from simpletuner.demo.comparison.measure import AdapterEvaluator
from simpletuner.demo.comparison.plan import LORA, STANDARD, Run
from simpletuner.demo.comparison.run import MODEL, Benchmark, run_config
from simpletuner.demo.comparison.statistics import difference, estimate
from simpletuner.demo.evaluate import Sampling
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.io.atomic import JsonValue
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.sdxl.embedded import load_pipeline
from simpletuner.helpers.training.build import build_trainer

RANK = 8
VARIANTS: dict[str, dict[str, JsonValue]] = {
    "`l2`": {},
    "`huber`": {"loss_type": "huber"},
    "`smooth_l1`": {"loss_type": "smooth_l1"},
    "`snr_gamma` 5": {"snr_gamma": 5},
    "`debiased_estimation_loss`": {"debiased_estimation_loss": True},
    "`offset_noise`": {"offset_noise": True},
    "`input_perturbation` 0.1": {"input_perturbation": 0.1},
}


def main() -> None:
    """Train and measure what is missing, and print one row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output/benchmark-losses"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    concepts, variants = list(CONCEPTS), list(VARIANTS)
    if options.quick:
        concepts, variants, options.seeds, options.steps = concepts[:1], variants[:2], 1, 1
        measure.NOISES_PER_VIEW = 1
    runs = [Run(LORA, RANK, concept, seed) for seed, concept in product(range(options.seeds), concepts)]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else options.folder
        losses = {
            variant: [
                held_out_loss(folder / f"{number}", run, steps=options.steps, keys=VARIANTS[variant])
                for run in runs
            ]
            for number, variant in enumerate(variants)
        }
    bands = list(losses[variants[0]][0])
    print(f"{len(runs)} runs of each\n\n| | {' | '.join(bands)} |\n|---|{'---|' * len(bands)}")
    for variant in variants:
        print(f"| {variant} | {' | '.join(shown(losses, variant, band) for band in bands)} |")


def held_out_loss(folder: Path, run: Run, *, steps: int, keys: dict[str, JsonValue]) -> dict[str, float]:
    """Noise band -> held-out loss after a run with these keys; trained now unless an earlier start has."""
    folder = folder / run.name
    file = folder / f"loss-{steps}.json"
    if not file.exists():
        CONCEPTS[run.concept].save_dataset(folder / "picture")
        benchmark = Benchmark(folder, MODEL, replace(STANDARD, steps=(steps,)))
        (folder / "config.json").write_text(json.dumps(run_config(benchmark, run, folder=folder) | keys))
        build_trainer(load_config(folder / "config.json", families=registry.specs())).run()
        evaluator = AdapterEvaluator(
            load_pipeline(MODEL, device=torch.device("cpu")),
            num_views=1,
            num_neutral=1,
            sampling=Sampling(steps=2, guidance=1.0),
        )
        found = evaluator.measure(
            folder / "output" / ADAPTER_FILE, concept=CONCEPTS[run.concept], seed=run.seed
        )
        file.write_text(json.dumps(found.loss))
    losses: dict[str, float] = json.loads(file.read_bytes())
    return losses


def shown(losses: dict[str, list[dict[str, float]]], variant: str, band: str) -> str:
    """The mean loss of the first variant, and the others' mean difference from it, with intervals."""
    own, reference = (
        np.array([each[band] for each in losses[name]]) for name in (variant, next(iter(losses)))
    )
    is_reference = variant == next(iter(losses))
    found = estimate(own) if is_reference else difference(own, reference)
    sign = "" if is_reference else "+"
    return f"{found.mean:{sign}.4f} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"


if __name__ == "__main__":
    main()

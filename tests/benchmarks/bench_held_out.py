"""B21: the loss of held-out images while an adapter overfits, and what measuring it costs.

python tests/benchmarks/bench_held_out.py [--steps 600] [--seeds 1]

Five views of a character on the embedded model, and five others held out; T-LoRA, and LoRA of the same rank.
Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from simpletuner.demo.comparison.concepts import CONCEPTS, SUBJECT

HERE = Path(__file__).parents[2]
NUM_TRAINED = NUM_HELD_OUT = 5
EVERY = 100
TARGETS = {"apply_preset": {"target_module": ["Attention", "FeedForward"]}}
METHODS: dict[str, dict[str, object]] = {
    "T-LoRA": {
        "algo": "tlora",
        "multiplier": 1.0,
        "linear_dim": 16,
        "linear_alpha": 16,
        "tlora_min_rank": 8,
        **TARGETS,
    },
    "LoRA": {"algo": "lora", "multiplier": 1.0, "linear_dim": 16, "linear_alpha": 16, **TARGETS},
}


def paint(folder: Path) -> None:
    """Views of one character, each with the same caption: some to train, some to hold out."""
    concept = next(iter(CONCEPTS.values()))
    for index, view in enumerate(concept.other_views(NUM_TRAINED + NUM_HELD_OUT)):
        place = folder / ("trained" if index < NUM_TRAINED else "held-out")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(concept.draw(view)).save(place / f"{index:02}.png")
        (place / f"{index:02}.txt").write_text(f"{SUBJECT}\n")


def train(folder: Path, method: str, *, steps: int, seed: int) -> tuple[list[dict[str, Any]], float]:
    """The evaluations of a run, and the median of the seconds of its steps."""
    output = folder / f"{method}-{seed}"
    datasets = [
        {"id": "trained", "instance_data_dir": str(folder / "trained")},
        {"id": "held-out", "dataset_type": "eval", "instance_data_dir": str(folder / "held-out")},
    ]
    keys = {
        "pretrained_model_name_or_path": str(HERE / "simpletuner/demo/sdxl"),
        "model_family": "sdxl",
        "lora_type": "lycoris",
        "lycoris_config": METHODS[method],
        "data_backend_config": datasets,
        "output_dir": str(output),
        "cache_dir_vae": str(folder / "vae"),
        "cache_dir_text": str(folder / "text"),
        "resolution": 64,
        "aspect_bucket_alignment": 8,
        "max_train_steps": steps,
        "train_batch_size": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1.5e-3,
        "lr_warmup_steps": 10,
        "mixed_precision": "no",
        "seed": seed,
        "checkpoint_step_interval": 0,
        "validation_disable": True,
        "eval_steps_interval": EVERY,
    }
    file = folder / f"{method}-{seed}.json"
    file.write_text(json.dumps(keys))
    command = [sys.executable, "-m", "simpletuner.train", "--config", str(file)]
    subprocess.run(command, check=True, cwd=HERE, capture_output=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    return evaluations, median(row["seconds"] for row in rows)


def main() -> None:
    """Print one table for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paint(folder)
        for seed in range(1, arguments.seeds + 1):
            for method in METHODS:
                evaluations, step_s = train(folder, method, steps=arguments.steps, seed=seed)
                took_s = median(each["seconds"] for each in evaluations)
                print(f"{method}, seed {seed}: {took_s:.2f} s an evaluation, {took_s / step_s:.1f} steps")
                for each in evaluations:
                    losses = each["eval_loss"], each["eval_train_loss"]
                    print(
                        f"  step {each['step']:4}  held out {losses[0]:.4f}  training images {losses[1]:.4f}"
                    )


if __name__ == "__main__":
    main()

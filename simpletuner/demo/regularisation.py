"""Measures what regularisation keeps of the class: `python -m simpletuner.demo.regularisation FOLDER`.

T-LoRA learns the character "a sks toy" from one image, alone and beside images of other characters, which
the model knows as "a toy". Afterwards a closed form reads, without another network, how much of the new
character is in images for "a toy".
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simpletuner.demo.comparison.concepts import CONCEPTS, Concept, View
from simpletuner.demo.comparison.likeness import likeness
from simpletuner.demo.comparison.plan import CONTENDERS, LEARNING_RATE
from simpletuner.demo.comparison.statistics import difference, estimate
from simpletuner.demo.evaluate import Sampling, sample_images
from simpletuner.demo.scenes import ImageArray, caption
from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.sdxl.embedded import load_pipeline
from simpletuner.helpers.training.build import build_trainer

logger = logging.getLogger(__name__)

MODEL = Path(__file__).parent / "sdxl"
CLASS = "a toy"
METHODS = ("none", "base", "data")
"""Without regularisation, and the two values of regularisation_target."""
CLASS_FOLDER = "class"
NUM_CLASS_IMAGES = 16
SUBJECT_STEPS = 160
"""Steps on the image of the subject; as many on the others come on top."""
RANK = 16
NUM_VIEWS, NUM_NEUTRAL = 8, 4
SAMPLING = Sampling(steps=12, guidance=3.0)
MEASURES = {
    "subject": 'likeness of "a sks toy"',
    "class": 'likeness of "a toy" to it',
    "background": 'training background behind "a toy"',
    "alignment": 'prompt alignment of "a toy"',
}


@dataclass(frozen=True, slots=True)
class Run:
    """One adapter."""

    method: str
    concept: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.method}_{self.concept}_seed-{self.seed}"


def class_prompt(view: View) -> str:
    """The prompt for any character in a view."""
    assert view.place is not None, "a view of the benchmark has a place"
    return caption(CLASS, place=view.place, background=view.background)


def save_class_images(folder: Path) -> None:
    """Images of the base model for the class, with their prompts as captions."""
    folder.mkdir(parents=True, exist_ok=True)
    views = next(iter(CONCEPTS.values())).other_views(NUM_CLASS_IMAGES)
    prompts = [class_prompt(view) for view in views]
    images = sample_images(load_pipeline(MODEL, device=torch.device("cpu")), prompts, sampling=SAMPLING)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        Image.fromarray(image).save(folder / f"class-{index:02}.png")
        (folder / f"class-{index:02}.txt").write_text(prompt + "\n", encoding="utf-8")


def run_config(run: Run, *, folder: Path, class_images: Path) -> dict[str, Any]:
    """The config.json of a run; an epoch draws the subject as often as the class."""
    images = folder / "images"
    CONCEPTS[run.concept].save_dataset(images)
    common = {"type": "local", "caption_strategy": "textfile"}
    subject = {"id": "subject", "instance_data_dir": str(images), "repeats": NUM_CLASS_IMAGES - 1, **common}
    others = {"id": "class", "instance_data_dir": str(class_images), "is_regularisation_data": True, **common}
    is_alone = run.method == "none"
    return {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(MODEL),
        "lora_type": "lycoris",
        "lycoris_config": next(each for each in CONTENDERS if each.name == "T-LoRA").lycoris(RANK),
        "data_backend_config": [subject] if is_alone else [subject, others],
        **({} if is_alone else {"regularisation_target": run.method}),
        "output_dir": str(folder / "output"),
        "cache_dir_vae": str(folder / "cache" / "vae"),
        "cache_dir_text": str(folder / "cache" / "text"),
        "resolution": 64,
        "resolution_type": "pixel",
        "aspect_bucket_alignment": 8,
        "max_train_steps": SUBJECT_STEPS * (1 if is_alone else 2),
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
        "seed": run.seed,
        "checkpoint_step_interval": 0,
        "validation_disable": True,
    }


def train(run: Run, *, folder: Path, class_images: Path) -> Path:
    """Train a run; its adapter file."""
    write_json(folder / "config.json", run_config(run, folder=folder, class_images=class_images))
    code = build_trainer(load_config(folder / "config.json", families=registry.specs())).run()
    assert code == 0, f"{run.name} ended with exit code {code}"
    return folder / "output" / ADAPTER_FILE


def measure(file: Path | None, *, concept: Concept, seed: int) -> dict[str, float]:
    """The MEASURES of an adapter file, or of the base model for None."""
    pipeline = load_pipeline(MODEL, device=torch.device("cpu"))
    if file is not None:
        load_into_pipeline(pipeline, file)
    views = concept.other_views(NUM_VIEWS)
    named = ["a sks toy"] * NUM_NEUTRAL
    asked = [class_prompt(view) for view in views]
    sampling = Sampling(steps=SAMPLING.steps, guidance=SAMPLING.guidance, seed=seed)
    images = sample_images(pipeline, [*named, *asked, *[CLASS] * NUM_NEUTRAL], sampling=sampling)
    subject, in_view = images[:NUM_NEUTRAL], images[NUM_NEUTRAL : NUM_NEUTRAL + NUM_VIEWS]
    others = images[NUM_NEUTRAL:]
    unasked = [View.parse(image) for image in images[-NUM_NEUTRAL:]]
    return {
        "subject": _likeness(subject, concept),
        "class": _likeness(others, concept),
        "background": _mean([shown.background == concept.trained.background for shown in unasked]),
        "alignment": _mean(list(_followed(in_view, views))),
    }


def train_and_measure(run: Run, *, folder: Path) -> dict[str, float]:
    """The measures of a run, from its file if it is done."""
    torch.set_num_threads(1)
    file = folder / "results" / f"{run.name}.json"
    if not file.exists():
        adapter = None
        if run.method in METHODS:
            adapter = train(run, folder=folder / run.name, class_images=folder / CLASS_FOLDER)
        write_json(file, measure(adapter, concept=CONCEPTS[run.concept], seed=run.seed))
        shutil.rmtree(folder / run.name, ignore_errors=True)
    found: dict[str, float] = json.loads(file.read_bytes())
    return found


def report(records: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Lines of two Markdown tables: means, and differences to training without regularisation."""
    yield "| | " + " | ".join(MEASURES.values()) + " |"
    yield "|---" * (len(MEASURES) + 1) + "|"
    for name, found in records.items():
        yield f"| {name} | " + " | ".join(str(estimate(_values(found, key))) for key in MEASURES) + " |"
    for name in METHODS[1:]:
        pairs = (difference(_values(records[name], key), _values(records["none"], key)) for key in MEASURES)
        yield f"| {name} less none | " + " | ".join(map(str, pairs)) + " |"


def main() -> None:
    """Train and measure what is missing in the folder, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each of the three concepts")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    folder = arguments.folder.resolve()
    if not (folder / CLASS_FOLDER).exists():
        save_class_images(folder / CLASS_FOLDER)
    methods = ("no adapter", *METHODS)
    order = product(range(arguments.seeds), CONCEPTS, methods)
    runs = [Run(method, concept, seed) for seed, concept, method in order]
    # Spawned, because torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        measured = list(pool.map(partial(train_and_measure, folder=folder), runs))
    records: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for run, measures in zip(runs, measured, strict=True):
        records[run.method].append(measures)
    logger.info("%s", "\n".join(report(records)))


def _likeness(images: Sequence[ImageArray], concept: Concept) -> float:
    return _mean([likeness(image, concept.character) for image in images])


def _followed(images: Sequence[ImageArray], views: Sequence[View]) -> Iterator[bool]:
    """Of each image: whether place, background colour and pattern follow the prompt."""
    for image, view in zip(images, views, strict=True):
        shown = View.parse(image)
        yield shown.place == view.place
        yield shown.background.colour == view.background.colour
        yield shown.background.pattern == view.background.pattern


def _values(records: Sequence[dict[str, float]], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([record[key] for record in records], dtype=np.float64)


def _mean(values: Sequence[float | bool]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()

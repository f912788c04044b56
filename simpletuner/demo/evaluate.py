"""Evaluates prompt following of the embedded model: `python -m simpletuner.demo.evaluate FOLDER`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from simpletuner.demo.parser import accuracy, parse_scene
from simpletuner.demo.scenes import ImageArray, evaluation_scenes
from simpletuner.helpers.models.sdxl.embedded import load_pipeline
from simpletuner.helpers.randomness import mix

logger = logging.getLogger(__name__)

BATCH = 50


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings of an evaluation."""

    prompts: int = 200
    steps: int = 25
    guidance: float = 4.0
    seed: int = 1


class PipelineOutput(Protocol):
    """The result of a pipeline call."""

    images: Sequence[object]


class Pipeline(Protocol):
    """A diffusers text-to-image pipeline."""

    def __call__(self, prompt: list[str], **options: object) -> PipelineOutput:
        """Generate one image for each prompt."""


def evaluate(pipeline: Pipeline, *, sampling: Sampling) -> dict[str, float]:
    """Attribute -> share of held-out prompts that the images follow."""
    scenes = evaluation_scenes(sampling.prompts)
    images = sample_images(pipeline, [str(scene) for scene in scenes], sampling=sampling)
    return accuracy([parse_scene(image) for image in images], scenes)


def sample_images(pipeline: Pipeline, prompts: Sequence[str], *, sampling: Sampling) -> list[ImageArray]:
    """One image for each prompt, each with a seed of its own."""
    images: list[ImageArray] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        seeds = (mix(sampling.seed, "sample", start + index) for index in range(len(batch)))
        values = pipeline(
            batch,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        images += list(np.rint(np.asarray(values) * 255).astype(np.uint8))
    return images


def format_shares(shares: dict[str, float]) -> str:
    """Percentages in one line."""
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def main() -> None:
    """Load a model folder with the stock pipeline and evaluate it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    for name, default in asdict(Sampling()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    sampling = Sampling(**{name: getattr(arguments, name) for name in asdict(Sampling())})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipeline = load_pipeline(arguments.folder, device=torch.device(arguments.device))
    logger.info("%s", format_shares(evaluate(pipeline, sampling=sampling)))


if __name__ == "__main__":
    main()

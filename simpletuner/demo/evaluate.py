"""Judges whether a model follows prompts of the world: `python -m simpletuner.demo.evaluate FOLDER`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from simpletuner.demo.parser import read_scene, share_right
from simpletuner.demo.scenes import Picture, evaluation_scenes
from simpletuner.helpers.models.sdxl.embedded import load_pipeline
from simpletuner.helpers.randomness import mix

logger = logging.getLogger(__name__)

BATCH = 50


@dataclass(frozen=True, slots=True)
class Sampling:
    """How pictures are made from prompts."""

    prompts: int = 200
    steps: int = 25
    guidance: float = 4.0
    seed: int = 1


class Images(Protocol):
    """What a pipeline returns."""

    images: Sequence[object]


class Pipeline(Protocol):
    """A text-to-image pipeline of diffusers."""

    def __call__(self, prompt: list[str], **options: object) -> Images:
        """Make one picture for each prompt."""


def judge(pipeline: Pipeline, *, sampling: Sampling) -> dict[str, float]:
    """Share of held-out prompts of which each attribute can be read in the picture."""
    scenes = evaluation_scenes(sampling.prompts)
    pictures = sample(pipeline, [str(scene) for scene in scenes], sampling=sampling)
    return share_right([read_scene(picture) for picture in pictures], scenes)


def sample(pipeline: Pipeline, prompts: Sequence[str], *, sampling: Sampling) -> list[Picture]:
    """One picture for each prompt, each from a noise of its own."""
    pictures: list[Picture] = []
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
        pictures += list(np.rint(np.asarray(values) * 255).astype(np.uint8))
    return pictures


def describe(shares: dict[str, float]) -> str:
    """Shares in one line."""
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def main() -> None:
    """Load a model folder with the stock pipeline and judge it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    for name, default in asdict(Sampling()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    sampling = Sampling(**{name: vars(arguments)[name] for name in asdict(Sampling())})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipeline = load_pipeline(arguments.folder, device=torch.device(arguments.device))
    logger.info("%s", describe(judge(pipeline, sampling=sampling)))


if __name__ == "__main__":
    main()

"""What Flux.2's two shifts of training train: noise levels, open ranks, and losses of a tiny Flux.2.

    python tests/benchmarks/bench_training_shift.py --seeds 3

The first table is computed. For the second, T-LoRA of rank 32 learns four images on a tiny Flux.2 with random
weights, with the shifts of 1024 px; the loss is measured at 24 noise levels of each band, before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image

from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.contracts import Batch, NoisyBatch
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.flow_matching import shift_sigma, sigma_to_timestep
from simpletuner.helpers.models.flux2.spec import empirical_shift, training_shift
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.reporting.noise_bands import BANDS, band_of
from simpletuner.helpers.training.build import build_trainer
from simpletuner.helpers.training.trainer import Trainer

NAMES = ("sampling", "flux1")
RANK = 32
LEVELS = {"0-500": (0.02, 0.49), "500-800": (0.51, 0.79), "800-1000": (0.81, 0.99)}
NUM_LEVELS = 24


def shift(name: str, edge_px: int) -> float:
    tokens = edge_px**2 // 16**2
    return training_shift({"flux2_training_shift": name}, tokens) or empirical_shift({}, tokens)


def computed() -> Iterator[str]:
    """Rows of the first table: shift, mean timestep, shares of the bands, mean open ranks."""
    normal = NormalDist()
    sigmas = [1 / (1 + np.exp(-normal.inv_cdf((index + 0.5) / 4000))) for index in range(4000)]
    for edge_px in (512, 1024, 1536):
        for name in NAMES:
            found = shift(name, edge_px)
            timesteps = [sigma_to_timestep(shift_sigma(float(sigma), found)) for sigma in sigmas]
            bands = [sum(band_of(each) == index for each in timesteps) / 4000 for index in range(len(BANDS))]
            ranks = [
                fmean(RankSchedule(RANK, min_rank=least).rank_at(each) for each in timesteps)
                for least in (1, RANK // 2)
            ]
            shares = " | ".join(f"{100 * share:.0f} %" for share in bands)
            yield (
                f"| {edge_px} px, `{name}` | {found:.2f} | {fmean(timesteps):.0f} | {shares} | "
                f"{ranks[0]:.1f} | {ranks[1]:.1f} |"
            )


def config(folder: Path, *, value: float, seed: int, steps: int) -> Path:
    model, images = folder / "model", folder / "images"
    if not model.exists():
        save_tiny_flux2(model, klein=True)
        images.mkdir()
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(images / f"{index}.png")
    layers = {"target_module": ["Attention", "FeedForward"]}
    tlora = {"algo": "tlora", "multiplier": 1.0, "linear_dim": RANK, "linear_alpha": RANK}
    keys: dict[str, Any] = {
        "model_family": "flux2",
        "pretrained_model_name_or_path": str(model),
        "lora_type": "lycoris",
        "lycoris_config": {**tlora, "apply_preset": layers},
        "data_backend_config": [{"id": "images", "instance_data_dir": str(images)}],
        "output_dir": str(folder / f"output-{value:.2f}-{seed}"),
        "cache_dir_vae": str(folder / "vae"),
        "cache_dir_text": str(folder / "text"),
        "resolution": 64,
        "mixed_precision": "no",
        "max_train_steps": steps,
        "train_batch_size": 4,
        "gradient_checkpointing": False,
        "learning_rate": 3e-3,
        "lr_scheduler": "constant",
        "flow_schedule_shift": value,
        "checkpoint_step_interval": 0,
        "validation_disable": True,
        "seed": seed,
    }
    file = folder / "config.json"
    file.write_text(json.dumps(keys))
    return file


@torch.no_grad()
def losses(trainer: Trainer, batch: Batch) -> list[float]:
    """The mean squared error of each band, under the rank mask of its noise levels."""
    found = []
    for low, high in LEVELS.values():
        errors = []
        for index, sigma in enumerate(np.linspace(low, high, NUM_LEVELS)):
            noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(index))
            sigmas = (float(np.float32(sigma)),) * len(batch)
            noisy = NoisyBatch(
                latents=(1 - sigmas[0]) * batch.latents + sigmas[0] * noise,
                target=noise - batch.latents,
                timesteps=tuple(map(sigma_to_timestep, sigmas)),
                weight=torch.ones(len(batch)),
                sigmas=sigmas,
            )
            with trainer.trainable.rank_mask_for(noisy.timesteps):
                prediction = trainer.family.predict(trainer.denoiser, noisy, batch)
            errors.append(float((prediction - noisy.target).square().mean()))
        found.append(fmean(errors))
    return found


def trained(*, seeds: int, steps: int) -> Iterator[str]:
    """Rows of the second table: the loss of each band, as a share of that before training."""
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            value, shares = shift(name, 1024), []
            for seed in range(seeds):
                file = config(Path(folder), value=value, seed=seed, steps=steps)
                trainer = build_trainer(load_config(file, families=registry.specs()))
                assert isinstance(trainer, Trainer)
                batch = next(trainer.data.batches())
                before = losses(trainer, batch)
                trainer.run()
                after = losses(trainer, batch)
                shares.append([new / old for new, old in zip(after, before, strict=True)])
            spread = (
                f"{fmean(band):.3f} ({stdev(band):.3f})" if seeds > 1 else f"{band[0]:.3f}"
                for band in zip(*shares, strict=True)
            )
            yield f"| `{name}`, {value:.2f} | " + " | ".join(spread) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write("\n".join([*computed(), "", *trained(seeds=options.seeds, steps=options.steps)]) + "\n")


if __name__ == "__main__":
    main()

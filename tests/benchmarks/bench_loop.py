"""B26: the training loop against a bare loop written by hand, with the same adapter on the embedded SDXL.

    python tests/benchmarks/bench_loop.py [--quick] [--pairs 30] [--profile]

Both train the same model and adapter on the demo's image with the same optimiser, so that only the loop
differs. The loop reads its data from the caches, draws noise and timesteps per sample, checks losses and
gradients, and writes its log. The bare one has a batch in memory and does what a step cannot do without:
noise, rank mask, forward, backward, clipping, AdamW. They take turns in blocks of steps.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, machine, paired

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
from simpletuner.helpers.training.trainer import Trainer

CONFIG = Path(__file__).parents[2] / "config" / "config.json"
WITHOUT = {
    "validation_step_interval": 10**6,
    "checkpoint_step_interval": 10**6,
    "max_train_steps": 10**6,
}
"""No checkpoint and no validation: the steps alone."""


def main() -> None:
    """Time blocks of steps of both loops."""
    options = parse()
    with TemporaryDirectory() as folder:
        config = load_config(changed(Path(folder)), families=registry.facts())
        trainer = build_trainer(config)
        assert isinstance(trainer, Trainer)
        with trainer.resources, trainer.trackers, trainer.page, trainer.display:
            loop, bare = whole(trainer), by_hand(trainer)
            if options.profile:
                show_profile(loop)
                return
            found = paired(loop, bare, pairs=options.pairs, steps=options.steps)
    print(f"\n{machine()}; {options.pairs} pairs of blocks of {options.steps} steps; CPU time\n")
    print("| case | ratio to the bare loop | 95 % interval | loop ms | bare ms |\n|---|---|---|---|---|")
    interval = f"{found.low:.3f}-{found.high:.3f}"
    print(f"| T-LoRA | {found.ratio:.3f} | {interval} | {found.first_ms:.3g} | {found.second_ms:.3g} |")


def parse() -> argparse.Namespace:
    """The options of every bench, and those of this one."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--pairs", type=int, default=30)
    own.add_argument("--steps", type=int, default=5, help="steps of a block")
    own.add_argument("--profile", action="store_true", help="functions of the loop by time, and no ratio")
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    options = arguments(__doc__)
    vars(options).update(vars(mine))
    if options.quick:
        options.pairs, options.steps = 2, 1
    return options


def changed(folder: Path) -> Path:
    """The demo's configuration with its output in a folder, without what interrupts the steps."""
    values = json.loads(CONFIG.read_text())
    del values["validation_compared_config"]
    folders = {"output_dir": "out", "cache_dir_vae": "vae", "cache_dir_text": "text"}
    values |= WITHOUT | {key: str(folder / name) for key, name in folders.items()}
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    return file


def whole(trainer: Trainer) -> Callable[[], None]:
    """A step of the run, with all that follows a step."""
    batches = trainer.data.batches(start=0)

    def step() -> None:
        trainer._after_step(trainer.optimizer_step(batches))

    return step


def by_hand(trainer: Trainer) -> Callable[[], None]:
    """A step written by hand on the run's model, adapter and optimiser."""
    batch = next(iter(trainer.data.batches(start=0)))
    added = {"text_embeds": batch.text.pooled, "time_ids": torch.full((2, 6), 64.0)}
    shares = torch.linspace(0.9991, 0.0683, 1000)  # of the image that noise leaves, about SDXL's
    generator = torch.Generator().manual_seed(0)
    parameters = trainer.trainable.parameters()

    def step() -> None:
        timesteps = torch.randint(1000, (2,), generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        share = shares[timesteps].view(-1, 1, 1, 1)
        noisy = share * batch.latents + (1 - share.square()).sqrt() * noise
        with trainer.trainable.rank_mask_for(timesteps.tolist()):
            prediction = trainer.denoiser(
                noisy, timesteps, batch.text.prompt_embeds, added_cond_kwargs=added, return_dict=False
            )[0]
            (prediction - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        trainer.optimizer.optimizer.step()
        trainer.optimizer.optimizer.zero_grad()

    return step


def show_profile(step: Callable[[], None]) -> None:
    """Functions by their own time, of 100 steps."""
    for _ in range(10):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(100):
        step()
    profile.disable()
    pstats.Stats(profile).sort_stats("cumtime").print_stats("simpletuner|accelerate", 45)


if __name__ == "__main__":
    main()

"""Trains the embedded model from scratch: `python -m simpletuner.demo.pretrain --help`.

First the autoencoder, then the UNet together with both text encoders. The same command resumes an interrupted
run. training.json beside the weights records settings, training time and prompt following.

Shapes: B batch, N images, H W pixels, h w latent height and width.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from simpletuner.demo.curriculum import Example, random_caption, random_example, random_images, vocabulary
from simpletuner.demo.evaluate import Sampling, evaluate, format_shares
from simpletuner.demo.scenes import ImageArray
from simpletuner.demo.train_stage import Schedule, TrainStage
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.io.atomic import JsonValue, write_json
from simpletuner.helpers.models.diffusion import q_sample, velocity
from simpletuner.helpers.models.sdxl.embedded import (
    EDGE_PX,
    EmbeddedModel,
    load_pipeline,
    make_embedded,
    make_scheduler,
    save_half,
    standardise_latents,
)
from simpletuner.helpers.randomness import mix

logger = logging.getLogger(__name__)

KL_WEIGHT = 1e-4
CAPTION_DROPOUT = 0.1
NOISY_TIMESTEP = 700
"""From this timestep on, noise hides all but the coarse layout."""
NOISY_SHARE = 0.2
"""Share of samples forced to such timesteps after layout_steps; uniform drawing adds 0.3 of the others."""
ODD_SIZE_SHARE = 0.15
"""Share of samples with another size condition, so that the model learns to ignore it."""
ENCODE_BATCH = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """The training settings."""

    vae_steps: int = 15_000
    vae_batch: int = 4
    vae_learning_rate: float = 1e-3
    steps: int = 8000
    layout_steps: int = 2500
    """First steps, on the noisiest latents only; they teach words, colours and places."""
    batch: int = 32
    learning_rate: float = 7e-4
    num_pictures: int = 40_000
    """Training images; a key of training.json."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Interval in steps and sampling settings of the evaluations during training."""

    interval: int = 1500
    sampling: Sampling = field(default_factory=Sampling)


def train_vae(model: EmbeddedModel, *, plan: Plan, file: Path) -> TrainStage:
    """Train the autoencoder on examples and clutter; it ends with its EMA weights."""
    schedule = Schedule(steps=plan.vae_steps, learning_rate=plan.vae_learning_rate)
    stage = TrainStage([model.vae], schedule=schedule, file=file)

    def loss_fn(step: int) -> Tensor:
        rng = np.random.default_rng(mix(plan.seed, "autoencoder", step))
        pixels = to_pixels(list(islice(random_images(rng), plan.vae_batch))).to(model.vae.device)
        posterior = model.vae.encode(pixels).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        decoded = model.vae.decode(posterior.mean + posterior.std * noise.to(pixels.device)).sample
        divergence = posterior.kl().sum() / posterior.mean.numel()
        loss: Tensor = (decoded - pixels).abs().mean() + KL_WEIGHT * divergence
        return loss

    stage.train(loss_fn, after_step=lambda _: None)
    stage.load_ema()
    return stage


def make_examples(plan: Plan) -> list[Example]:
    """The denoiser's training set."""
    rng = np.random.default_rng(mix(plan.seed, "lessons"))
    return [random_example(rng) for _ in range(plan.num_pictures)]


def encode_images(model: EmbeddedModel, images: Sequence[ImageArray]) -> Tensor:
    """[N, 4, h, w] unscaled means of the latent distributions, on the CPU."""
    chunks = []
    with torch.no_grad():
        for start in range(0, len(images), ENCODE_BATCH):
            pixels = to_pixels(images[start : start + ENCODE_BATCH]).to(model.vae.device)
            chunks.append(model.vae.encode(pixels).latent_dist.mode().cpu())
    return torch.cat(chunks)


class DenoisingLoss:
    """Loss of the UNet and the text encoders."""

    def __init__(self, model: EmbeddedModel, *, plan: Plan, examples: Sequence[Example], latents: Tensor):
        """`latents`: scaled [N, 4, h, w] latents of the examples."""
        self.model, self.plan, self.examples, self.latents = model, plan, examples, latents
        self.alpha_bars: Tensor = make_scheduler().alphas_cumprod

    def loss_fn(self, step: int) -> Tensor:
        """Mean squared error of the predicted velocity; the step number determines the batch."""
        rng = np.random.default_rng(mix(self.plan.seed, "denoiser", step))
        chosen = rng.integers(len(self.examples), size=self.plan.batch)
        clean = self.latents[chosen]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        timesteps = self._draw_timesteps(rng, share=1.0 if step < self.plan.layout_steps else NOISY_SHARE)
        alpha_bar = self.alpha_bars[timesteps][:, None, None, None]  # [B, 1, 1, 1]
        noisy = q_sample(clean, noise, alpha_bar=alpha_bar)
        device = self.model.unet.device
        predicted = self.model.predict(
            noisy.to(device),
            timesteps=timesteps.to(device),
            text=self._encode([self.examples[index] for index in chosen], rng),
            sizes=self._draw_sizes(rng).to(device),
        )
        return mse_loss(predicted, velocity(clean, noise, alpha_bar=alpha_bar).to(device))

    def _encode(self, examples: Sequence[Example], rng: np.random.Generator) -> TextEmbeds:
        """Encode a random caption of each example; dropped captions become zeros."""
        text = self.model.encode_prompts([random_caption(example, rng) for example in examples])
        assert text.pooled is not None
        kept = torch.from_numpy(rng.random(len(examples)) >= CAPTION_DROPOUT).to(text.prompt_embeds)  # [B]
        return TextEmbeds(
            prompt_embeds=text.prompt_embeds * kept[:, None, None], pooled=text.pooled * kept[:, None]
        )

    def _draw_timesteps(self, rng: np.random.Generator, *, share: float) -> Tensor:
        """[B] timesteps, this share from NOISY_TIMESTEP up, the others uniform."""
        lowest = np.where(rng.random(self.plan.batch) < share, NOISY_TIMESTEP, 0)
        return torch.from_numpy(rng.integers(lowest, len(self.alpha_bars)))

    def _draw_sizes(self, rng: np.random.Generator) -> Tensor:
        """[B, 6] SDXL size conditions: original size, crop and target size in pixels."""
        sizes = np.tile([EDGE_PX, EDGE_PX, 0, 0, EDGE_PX, EDGE_PX], (self.plan.batch, 1)).astype(np.float32)
        odd = rng.random(self.plan.batch) < ODD_SIZE_SHARE
        sizes[odd, :2] = rng.integers(EDGE_PX, 1025, (odd.sum(), 2))
        sizes[odd, 2:4] = rng.integers(0, EDGE_PX, (odd.sum(), 2))
        return torch.from_numpy(sizes)


def to_pixels(images: Sequence[ImageArray]) -> Tensor:
    """[B, 3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def pretrain(output: Path, *, work: Path, plan: Plan, device: torch.device, evaluation: Evaluation) -> None:
    """Train both stages and write the model; finished steps in `work` are not repeated."""
    model = make_embedded(vocabulary(), seed=plan.seed)
    for module in (*model.denoising_modules(), model.vae):
        module.to(device)
    vae_stage = train_vae(model, plan=plan, file=work / "autoencoder.pt")
    examples = make_examples(plan)
    latents = encode_images(model, [example.image for example in examples])
    scaled = standardise_latents(model.vae, latents)
    denoising = DenoisingLoss(model, plan=plan, examples=examples, latents=scaled)
    denoiser_stage = TrainStage(
        model.denoising_modules(),
        schedule=Schedule(steps=plan.steps, learning_rate=plan.learning_rate),
        file=work / "denoiser.pt",
    )

    def save_and_evaluate(step: int) -> None:
        if step % evaluation.interval and step != plan.steps:
            return
        with denoiser_stage.ema_weights():
            save_half(model, output)
        shares = evaluate(load_pipeline(output, device=device), sampling=evaluation.sampling)
        logger.info("Held-out prompts after step %d: %s.", step, format_shares(shares))
        record: dict[str, JsonValue] = {
            "plan": asdict(plan),
            "sampling": asdict(evaluation.sampling),
            "steps_done": step,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "autoencoder_seconds": round(vae_stage.seconds),
            "denoiser_seconds": round(denoiser_stage.seconds),
            "held_out_prompts_right": shares,
        }
        write_json(output / "training.json", record)

    denoiser_stage.train(denoising.loss_fn, after_step=save_and_evaluate)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable training state")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--evaluation-interval", type=int, default=1500, help="steps between evaluations")
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    plan = Plan(**{name: getattr(arguments, name) for name in asdict(Plan())})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(
        arguments.output,
        work=arguments.work,
        plan=plan,
        device=torch.device(arguments.device),
        evaluation=Evaluation(interval=arguments.evaluation_interval),
    )


if __name__ == "__main__":
    main()

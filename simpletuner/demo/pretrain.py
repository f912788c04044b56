"""Makes the embedded model from nothing: `python -m simpletuner.demo.pretrain --output FOLDER`.

First the autoencoder learns to draw, then the UNet and both text encoders learn together what the captions
mean. A run that is stopped goes on where it was when it is started again with the same arguments. Beside
the model lies training.json: what it was made with, how long that took, and how well it follows prompts.

Shapes: B batch, N pictures, H W pixels, h w latent height and width.
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

from simpletuner.demo.curriculum import Lesson, random_caption, random_lesson, random_pictures, words
from simpletuner.demo.evaluate import Sampling, describe, judge
from simpletuner.demo.scenes import Picture
from simpletuner.demo.train_stage import Schedule, Stage
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
"""From here on only the coarsest of a picture can be seen through the noise."""
NOISY_SHARE = 0.2
"""Share of samples at such timesteps, above the usual 0.3, once the layout is learnt."""
ODD_SIZE_SHARE = 0.15
"""Share of samples said to come from a picture of another size, so that sizes come to mean nothing."""
ENCODE_BATCH = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the result depends on besides the machine."""

    vae_steps: int = 15_000
    vae_batch: int = 4
    vae_learning_rate: float = 1e-3
    steps: int = 8000
    layout_steps: int = 2500
    """Steps at the start that see the noisiest latents only, and learn words, colours and places."""
    batch: int = 32
    learning_rate: float = 7e-4
    num_pictures: int = 40_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Judging:
    """How often the model is saved and judged, and how."""

    interval: int = 1500
    sampling: Sampling = field(default_factory=Sampling)


def train_vae(model: EmbeddedModel, *, plan: Plan, file: Path) -> Stage:
    """Teach the autoencoder pictures of the world and of clutter; it ends with its averaged weights."""
    schedule = Schedule(steps=plan.vae_steps, learning_rate=plan.vae_learning_rate)
    stage = Stage([model.vae], schedule=schedule, file=file)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng(mix(plan.seed, "autoencoder", step))
        pixels = to_pixels(list(islice(random_pictures(rng), plan.vae_batch))).to(model.vae.device)
        posterior = model.vae.encode(pixels).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        decoded = model.vae.decode(posterior.mean + posterior.std * noise.to(pixels.device)).sample
        divergence = posterior.kl().sum() / posterior.mean.numel()
        loss: Tensor = (decoded - pixels).abs().mean() + KL_WEIGHT * divergence
        return loss

    stage.train(loss_of, every=lambda _: None)
    stage.take_average()
    return stage


def make_lessons(plan: Plan) -> list[Lesson]:
    """The fixed set of pictures that the denoiser learns from."""
    rng = np.random.default_rng(mix(plan.seed, "lessons"))
    return [random_lesson(rng) for _ in range(plan.num_pictures)]


def encode_pictures(model: EmbeddedModel, pictures: Sequence[Picture]) -> Tensor:
    """[N, 4, h, w] means of the latent distributions, not scaled, on the CPU."""
    chunks = []
    with torch.no_grad():
        for start in range(0, len(pictures), ENCODE_BATCH):
            pixels = to_pixels(pictures[start : start + ENCODE_BATCH]).to(model.vae.device)
            chunks.append(model.vae.encode(pixels).latent_dist.mode().cpu())
    return torch.cat(chunks)


class Denoising:
    """The loss of the UNet and the text encoders."""

    def __init__(self, model: EmbeddedModel, *, plan: Plan, lessons: Sequence[Lesson], latents: Tensor):
        """Take the scaled [N, 4, h, w] latents of the lessons."""
        self.model, self.plan, self.lessons, self.latents = model, plan, lessons, latents
        self.alpha_bars: Tensor = make_scheduler().alphas_cumprod

    def loss_of(self, step: int) -> Tensor:
        """Squared error of the predicted velocity on a batch that the step's number decides."""
        rng = np.random.default_rng(mix(self.plan.seed, "denoiser", step))
        chosen = rng.integers(len(self.lessons), size=self.plan.batch)
        clean = self.latents[chosen]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        timesteps = self._draw_timesteps(rng, share=1.0 if step < self.plan.layout_steps else NOISY_SHARE)
        alpha_bar = self.alpha_bars[timesteps][:, None, None, None]  # [B, 1, 1, 1]
        noisy = q_sample(clean, noise, alpha_bar=alpha_bar)
        device = self.model.unet.device
        predicted = self.model.predict(
            noisy.to(device),
            timesteps=timesteps.to(device),
            text=self._encode([self.lessons[index] for index in chosen], rng),
            sizes=self._draw_sizes(rng).to(device),
        )
        return mse_loss(predicted, velocity(clean, noise, alpha_bar=alpha_bar).to(device))

    def _encode(self, lessons: Sequence[Lesson], rng: np.random.Generator) -> TextEmbeds:
        """Encode a caption of each lesson; some are dropped, which for this model means zeros."""
        text = self.model.encode_prompts([random_caption(lesson, rng) for lesson in lessons])
        assert text.pooled is not None
        kept = torch.from_numpy(rng.random(len(lessons)) >= CAPTION_DROPOUT).to(text.prompt_embeds)  # [B]
        return TextEmbeds(
            prompt_embeds=text.prompt_embeds * kept[:, None, None], pooled=text.pooled * kept[:, None]
        )

    def _draw_timesteps(self, rng: np.random.Generator, *, share: float) -> Tensor:
        """[B] timesteps: this share of them noisy, the others anything."""
        lowest = np.where(rng.random(self.plan.batch) < share, NOISY_TIMESTEP, 0)
        return torch.from_numpy(rng.integers(lowest, len(self.alpha_bars)))

    def _draw_sizes(self, rng: np.random.Generator) -> Tensor:
        """[B, 6] original size, crop and target size in pixels, as SDXL is told them."""
        sizes = np.tile([EDGE_PX, EDGE_PX, 0, 0, EDGE_PX, EDGE_PX], (self.plan.batch, 1)).astype(np.float32)
        odd = rng.random(self.plan.batch) < ODD_SIZE_SHARE
        sizes[odd, :2] = rng.integers(EDGE_PX, 1025, (odd.sum(), 2))
        sizes[odd, 2:4] = rng.integers(0, EDGE_PX, (odd.sum(), 2))
        return torch.from_numpy(sizes)


def to_pixels(pictures: Sequence[Picture]) -> Tensor:
    """[B, 3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def pretrain(output: Path, *, work: Path, plan: Plan, device: torch.device, judging: Judging) -> None:
    """Train both stages and write the model; what an earlier run has done in work is not done again."""
    model = make_embedded(words(), seed=plan.seed)
    for module in (*model.denoising_modules(), model.vae):
        module.to(device)
    drawing = train_vae(model, plan=plan, file=work / "autoencoder.pt")
    lessons = make_lessons(plan)
    latents = encode_pictures(model, [lesson.picture for lesson in lessons])
    scaled = standardise_latents(model.vae, latents)
    denoising = Denoising(model, plan=plan, lessons=lessons, latents=scaled)
    stage = Stage(
        model.denoising_modules(),
        schedule=Schedule(steps=plan.steps, learning_rate=plan.learning_rate),
        file=work / "denoiser.pt",
    )

    def save_and_judge(step: int) -> None:
        if step % judging.interval and step != plan.steps:
            return
        with stage.averaged():
            save_half(model, output)
        shares = judge(load_pipeline(output, device=device), sampling=judging.sampling)
        logger.info("Held-out prompts after step %d: %s.", step, describe(shares))
        record: dict[str, JsonValue] = {
            "plan": asdict(plan),
            "sampling": asdict(judging.sampling),
            "steps_done": step,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "autoencoder_seconds": round(drawing.seconds),
            "denoiser_seconds": round(stage.seconds),
            "held_out_prompts_right": shares,
        }
        write_json(output / "training.json", record)

    stage.train(denoising.loss_of, every=save_and_judge)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder of what a later start goes on from")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--judge-interval", type=int, default=1500, help="steps between saving and judging")
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    plan = Plan(**{name: vars(arguments)[name] for name in asdict(Plan())})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(
        arguments.output,
        work=arguments.work,
        plan=plan,
        device=torch.device(arguments.device),
        judging=Judging(interval=arguments.judge_interval),
    )


if __name__ == "__main__":
    main()

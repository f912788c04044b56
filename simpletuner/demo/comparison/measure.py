"""Measures an adapter on the embedded model in closed form, without another network.

Shapes: N images, C h w latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from simpletuner.demo.comparison.concepts import SUBJECT, Concept, View
from simpletuner.demo.comparison.likeness import likeness
from simpletuner.demo.comparison.spectrum import mean_participation
from simpletuner.demo.evaluate import Sampling, sample_images
from simpletuner.demo.pretrain import encode_images
from simpletuner.helpers.adapters.inference import load_into_pipeline, remove_from_pipeline
from simpletuner.helpers.models.diffusion import q_sample, velocity
from simpletuner.helpers.models.sdxl.embedded import EDGE_PX, SCALING_FACTOR, EmbeddedModel
from simpletuner.helpers.randomness import mix
from simpletuner.helpers.reporting import noise_bands

if TYPE_CHECKING:
    from simpletuner.helpers.adapters.files.foreign.translation import ScheduleOptions

BANDS = dict(zip(noise_bands.BANDS, starmap(range, pairwise((0, *noise_bands.EDGES, 1000))), strict=True))
"""Noise band -> its timesteps."""
ENDS = (0, 999)
"""Cleanest and noisiest timestep of training."""
LOSS_VIEWS = 8
NOISES_PER_VIEW = 4


class MaskedAdapter(Protocol):
    """An adapter that sets the rank mask of a batch."""

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Set the rank mask of each sample inside the context."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over the images of one measurement; shares and likenesses in [0, 1]."""

    concept: float
    """Likeness to the character for prompts with its name alone."""
    concept_in_view: float
    """Likeness to the character for prompts with a view."""
    alignment: float
    """Share of places, background colours and patterns that follow the prompt."""
    place: float
    background: float
    pattern: float
    background_back: float
    """Share of images for the name alone with the training image's background."""
    pose_back: float
    """Share of images for the name alone with the character at the training image's place."""
    background_leaks: float
    """Share of images for a view with the training image's background colour, against the prompt."""
    participation: float
    """Participation ratio of the delta with every rank active, mean of the layers; 0 without an adapter."""
    participation_noisiest: float
    """The same with the ranks that are active at the noisiest timestep of training."""
    loss: dict[str, float]
    """Noise band -> mean squared error of the velocity on held-out drawings."""


class AdapterEvaluator:
    """Measures adapters one after another on one embedded model."""

    def __init__(self, pipeline: Any, *, num_views: int, num_neutral: int, sampling: Sampling) -> None:
        """Take a stock pipeline; of sampling, only steps and guidance are used."""
        self.pipeline, self.num_views, self.num_neutral = pipeline, num_views, num_neutral
        self.sampling = sampling
        self.model = EmbeddedModel(
            unet=pipeline.unet,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            text_encoder_2=pipeline.text_encoder_2,
            tokenizer=pipeline.tokenizer,
            tokenizer_2=pipeline.tokenizer_2,
        )

    def measure(
        self, file: Path | None, *, concept: Concept, seed: int, schedule: ScheduleOptions | None = None
    ) -> Measures:
        """Measure an adapter file, or the base model for None; equal seeds give equal noise.

        Args:
            file: The file.
            concept: What it was trained on.
            seed: Of the sampling noise.
            schedule: Values in place of those of the file's rank schedule.
        """
        if file is None:
            return self._measure(None, concept=concept, seed=seed, participation=(0.0, 0.0))
        every, noisiest = (mean_participation(file, timestep=each, schedule=schedule) for each in ENDS)
        adapter = load_into_pipeline(self.pipeline, file, schedule=schedule)
        try:
            return self._measure(adapter, concept=concept, seed=seed, participation=(every, noisiest))
        finally:
            remove_from_pipeline(self.pipeline, adapter)

    def _measure(
        self,
        adapter: MaskedAdapter | None,
        *,
        concept: Concept,
        seed: int,
        participation: tuple[float, float],
    ) -> Measures:
        views = concept.other_views(self.num_views)
        prompts = [view.prompt for view in views] + [SUBJECT] * self.num_neutral
        images = sample_images(self.pipeline, prompts, sampling=replace(self.sampling, seed=seed))
        asked, neutral = images[: len(views)], images[len(views) :]
        found = [View.parse(image) for image in asked]
        pairs = list(zip(found, views, strict=True))
        shares = {
            "place": _share(shown.place == view.place for shown, view in pairs),
            "background": _share(shown.background.colour == view.background.colour for shown, view in pairs),
            "pattern": _share(shown.background.pattern == view.background.pattern for shown, view in pairs),
        }
        trained, unasked = concept.trained, [View.parse(image) for image in neutral]
        return Measures(
            concept=_mean(likeness(image, concept.character) for image in neutral),
            concept_in_view=_mean(likeness(image, concept.character) for image in asked),
            alignment=sum(shares.values()) / len(shares),
            **shares,
            background_back=_share(shown.background == trained.background for shown in unasked),
            pose_back=_share(shown.place == trained.place for shown in unasked),
            background_leaks=_share(shown.background.colour == trained.background.colour for shown in found),
            participation=participation[0],
            participation_noisiest=participation[1],
            loss=self._held_out_loss(adapter, concept=concept),
        )

    def _held_out_loss(self, adapter: MaskedAdapter | None, *, concept: Concept) -> dict[str, float]:
        views = concept.other_views(LOSS_VIEWS)
        clean = encode_images(self.model, [concept.draw(view) for view in views]) * SCALING_FACTOR
        return {
            name: self._loss(adapter, clean, views=views, timesteps=timesteps)
            for name, timesteps in BANDS.items()
        }

    @torch.no_grad()
    def _loss(
        self, adapter: MaskedAdapter | None, clean: Tensor, *, views: Sequence[View], timesteps: range
    ) -> float:
        """Mean squared error on [N, C, h, w] latents at evenly spaced timesteps of a band."""
        num = NOISES_PER_VIEW * len(views)
        generator = torch.Generator().manual_seed(mix(0, "held-out noise", timesteps.start))
        chosen = np.linspace(timesteps.start, timesteps.stop - 1, num).round().astype(int).tolist()
        repeated = clean.repeat(NOISES_PER_VIEW, 1, 1, 1)
        noise = torch.randn(repeated.shape, generator=generator)
        alpha_bar = self.pipeline.scheduler.alphas_cumprod[chosen][:, None, None, None]
        text = self.model.encode_prompts([view.prompt for view in views] * NOISES_PER_VIEW)
        sizes = torch.tensor([[EDGE_PX, EDGE_PX, 0, 0, EDGE_PX, EDGE_PX]] * num, dtype=torch.float32)
        with nullcontext() if adapter is None else adapter.rank_mask_for(chosen):
            predicted = self.model.predict(
                q_sample(repeated, noise, alpha_bar=alpha_bar),
                timesteps=torch.tensor(chosen),
                text=text,
                sizes=sizes,
            )
        return float(torch.nn.functional.mse_loss(predicted, velocity(repeated, noise, alpha_bar=alpha_bar)))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _share(values: Iterable[bool]) -> float:
    return _mean(float(value) for value in values)

"""What an adapter does to the embedded model, measured in closed form: no network judges another.

Shapes: N pictures, C h w latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from simpletuner.demo.comparison.concepts import SUBJECT, Concept, View
from simpletuner.demo.comparison.likeness import likeness
from simpletuner.demo.evaluate import Sampling, sample
from simpletuner.demo.pretrain import encode_pictures
from simpletuner.helpers.adapters.inference import load_into_pipeline, remove_from_pipeline
from simpletuner.helpers.models.diffusion import q_sample, velocity
from simpletuner.helpers.models.sdxl.embedded import EDGE_PX, SCALING_FACTOR, EmbeddedModel
from simpletuner.helpers.randomness import mix

BANDS = {"0-500": range(500), "500-800": range(500, 800), "800-1000": range(800, 1000)}
"""Name -> timesteps of a noise band."""
LOSS_VIEWS = 8
NOISES_PER_VIEW = 4


class Masks(Protocol):
    """What opens the ranks of a batch."""

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Open the ranks of each sample inside the context."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over the pictures of one measurement; shares and likenesses in [0, 1]."""

    concept: float
    """Likeness of the character to itself when only its name is asked for."""
    concept_in_view: float
    """The same in the views that were asked for."""
    alignment: float
    """Share of place, background colour and pattern that are those asked for."""
    place: float
    background: float
    pattern: float
    background_back: float
    """Share of pictures of the name alone that have the training picture's background."""
    pose_back: float
    """Share of pictures of the name alone that have the character at the training picture's place."""
    background_leaks: float
    """Share of pictures with the training picture's background colour although another was asked for."""
    loss: dict[str, float]
    """Noise band -> mean squared error of the velocity on pictures that were not trained on."""


class Bench:
    """One embedded model, on which adapters are tried one after another."""

    def __init__(self, pipeline: Any, *, num_views: int, num_neutral: int, sampling: Sampling) -> None:
        """Take a stock pipeline; sampling's seed and number of prompts are given with each measurement."""
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

    def measure(self, file: Path | None, *, concept: Concept, seed: int) -> Measures:
        """Measure an adapter, or the model without one; the same seed gives all contenders the same noise."""
        if file is None:
            return self._measure(None, concept=concept, seed=seed)
        adapter = load_into_pipeline(self.pipeline, file)
        try:
            return self._measure(adapter, concept=concept, seed=seed)
        finally:
            remove_from_pipeline(self.pipeline, adapter)

    def _measure(self, adapter: Masks | None, *, concept: Concept, seed: int) -> Measures:
        views = concept.other_views(self.num_views)
        prompts = [view.prompt for view in views] + [SUBJECT] * self.num_neutral
        pictures = sample(self.pipeline, prompts, sampling=replace(self.sampling, seed=seed))
        asked, neutral = pictures[: len(views)], pictures[len(views) :]
        found = [View.read(picture) for picture in asked]
        pairs = list(zip(found, views, strict=True))
        shares = {
            "place": _share(shown.place == view.place for shown, view in pairs),
            "background": _share(shown.background.colour == view.background.colour for shown, view in pairs),
            "pattern": _share(shown.background.pattern == view.background.pattern for shown, view in pairs),
        }
        trained, unasked = concept.trained, [View.read(picture) for picture in neutral]
        return Measures(
            concept=_mean(likeness(picture, concept.toy) for picture in neutral),
            concept_in_view=_mean(likeness(picture, concept.toy) for picture in asked),
            alignment=sum(shares.values()) / len(shares),
            **shares,
            background_back=_share(shown.background == trained.background for shown in unasked),
            pose_back=_share(shown.place == trained.place for shown in unasked),
            background_leaks=_share(shown.background.colour == trained.background.colour for shown in found),
            loss=self._held_out_loss(adapter, concept=concept),
        )

    def _held_out_loss(self, adapter: Masks | None, *, concept: Concept) -> dict[str, float]:
        views = concept.other_views(LOSS_VIEWS)
        clean = encode_pictures(self.model, [concept.draw(view) for view in views]) * SCALING_FACTOR
        return {
            name: self._loss(adapter, clean, views=views, timesteps=timesteps)
            for name, timesteps in BANDS.items()
        }

    @torch.no_grad()
    def _loss(
        self, adapter: Masks | None, clean: Tensor, *, views: Sequence[View], timesteps: range
    ) -> float:
        """Mean squared error on [N, C, h, w] latents at timesteps spread evenly over a band."""
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

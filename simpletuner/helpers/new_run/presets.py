"""Presets: settings of a run by model, purpose and memory of the card. `presets.json` holds them.

Imports no torch. GB of a card are the 2^30 bytes that its name counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

Purpose = Literal["subject", "style"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
CARDS = (8, 12, 16, 24, 48, 80)
"""Memory of the cards that presets are named by, in GB."""
KEPT_FREE = 0.05
"""Share of a card that the estimate of a preset leaves."""
REPORTED = 0.93
"""Share of its named memory that a card reports at least: some keep a part for error correction."""
NO_CARD = 0

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PurposeSettings:
    """How a model is trained for one purpose."""

    caption: str
    """Of images without a text file; {trigger} stands for the trigger, here and in the prompts."""
    prompts: Mapping[str, str]
    """Name -> prompt of a validation image."""
    steps: int
    """Of one image."""
    config: Settings
    lycoris: Settings
    evidence: tuple[str, ...]
    """Keys of evidence.json."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model with its presets."""

    name: str
    title: str
    config: Settings
    reads_latin_only: bool
    """Whether its text encoders know no words in other letters."""
    purposes: Mapping[Purpose, PurposeSettings]
    cards: Mapping[int, Settings]
    """Memory of a card in GB -> settings that fit it, and larger cards up to the next; 0 is no card."""

    @property
    def smallest(self) -> int:
        """Memory of the smallest card that it fits, in GB."""
        return min(self.cards)

    def card_for(self, memory: float) -> int | None:
        """The largest card with settings that is no larger than one of this memory; None if none is."""
        return max((card for card in self.cards if card * REPORTED <= memory), default=None)

    def settings(self, purpose: Purpose, card: int) -> dict[str, Any]:
        """The keys of config.json, but for those of the images and of the number of steps."""
        preset = self.purposes[purpose]
        return {**_content()["config"], **self.config, **preset.config, **self.cards[card]}


def models() -> dict[str, Model]:
    """Name -> model, smallest first."""
    return {name: _model(name, content) for name, content in _content()["models"].items()}


def times() -> Mapping[str, float]:
    """Name of a length of training -> factor of the steps."""
    factors: Mapping[str, float] = _content()["times"]
    return factors


def num_steps(preset: PurposeSettings, *, num_images: int, time: str) -> int:
    """Steps of a run: the preset's, more for many images, by the length; a multiple of four."""
    steps: float = max(preset.steps, _content()["steps_per_image"] * num_images) * times()[time]
    return 4 * max(1, round(steps / 4))


def fitting(memory: float) -> list[Model]:
    """The models with a preset for this memory in GB."""
    return [model for model in models().values() if model.card_for(memory) is not None]


def nearest(model: Model, card: int) -> str:
    """What to take where a model does not fit a card: the largest that does, or the model's smallest card."""
    others = [each for each in fitting(card) if each.smallest != NO_CARD]
    instead = [f"{others[-1].name} {card} GB"] if others else []
    return ", ".join([*instead, f"{model.name} {model.smallest} GB"])


def _model(name: str, content: Mapping[str, Any]) -> Model:
    return Model(
        name=name,
        title=content["title"],
        config=content["config"],
        reads_latin_only=content["reads_latin_only"],
        purposes={purpose: _purpose_settings(content["purposes"][purpose]) for purpose in PURPOSES},
        cards={int(card): settings for card, settings in content["cards"].items()},
    )


def _purpose_settings(content: Mapping[str, Any]) -> PurposeSettings:
    return PurposeSettings(**{**content, "evidence": tuple(content["evidence"])})


@cache
def _content() -> Mapping[str, Any]:
    text = Path(__file__).with_name("presets.json").read_text(encoding="utf-8")
    content: Mapping[str, Any] = json.loads(text)
    return content

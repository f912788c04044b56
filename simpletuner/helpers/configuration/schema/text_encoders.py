"""The section of config.json on the training of text encoders."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, model_validator

from simpletuner.helpers.configuration.schema.base import (
    NonNegativeNumber,
    OptionalCount,
    Section,
    contradiction,
)

_MAX_RATES = 2


def _rates(value: object) -> object:
    """One rate or several, also comma-separated; none for null.

    Raises:
        ValueError: There are none, or more than two.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null")):
        return ()
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[] ").split(",")]
    rates = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(rates) > _MAX_RATES:
        raise ValueError("must be one rate for all text encoders, or one for each of two.")
    return rates


class TextEncoderConfig(Section):
    """LoRA on the text encoders, beside the adapter of the denoiser."""

    train_text_encoder: bool = False
    """Train a LoRA on each text encoder too. Captions are then encoded in every step instead of cached. The
    other keys need it."""
    text_encoder_lr: Annotated[tuple[NonNegativeNumber, ...], BeforeValidator(_rates)] = ()
    """Learning rate of the text encoders: one, or one for each, "1e-5,2e-5"; 0 trains none of that encoder.
    Default: learning_rate."""
    text_encoder_lora_rank: OptionalCount = None
    """Rank of their LoRA. null is lora_rank, or linear_dim of the lycoris json."""
    stop_text_encoder_training: OptionalCount = None
    """Optimiser steps after which the text encoders stay as they are; null trains them to the end."""

    def rate_of(self, index: int) -> float | None:
        """Learning rate of a text encoder, counted from 0; None for the run's."""
        return (
            self.text_encoder_lr[min(index, len(self.text_encoder_lr) - 1)] if self.text_encoder_lr else None
        )

    def trains(self, index: int) -> bool:
        """Whether a text encoder, counted from 0, is trained."""
        return self.train_text_encoder and self.rate_of(index) != 0

    @model_validator(mode="after")
    def _trains_one(self) -> Self:
        if self.train_text_encoder and self.text_encoder_lr and not any(self.text_encoder_lr):
            raise contradiction(
                "text_encoder_lr",
                "0: trains no text encoder. Set train_text_encoder to false, or give a rate.",
                "train_text_encoder",
            )
        return self

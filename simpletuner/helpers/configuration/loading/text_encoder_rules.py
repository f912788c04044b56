"""Rules between the training of text encoders and other keys."""

from __future__ import annotations

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.loading.building import Source, Validated
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig, PrecisionConfig
from simpletuner.helpers.configuration.schema.text_encoders import TextEncoderConfig
from simpletuner.helpers.contracts import ModelSpec

LARGEST_RANK = 768
"""Above it the rank of a lycoris json stands for whole matrices: the width of a CLIP text encoder."""


def check_text_encoders(
    text_encoders: Validated[TextEncoderConfig],
    precision: Validated[PrecisionConfig],
    optimizer: Validated[OptimizerConfig],
    *,
    lycoris: LycorisConfig | None,
    spec: ModelSpec,
    source: Source,
) -> None:
    """Check that the family's text encoders can be trained with the other settings."""
    section = text_encoders.section
    if section is None or "train_text_encoder" in text_encoders.invalid_keys:
        return
    if not section.train_text_encoder:
        return
    if not spec.text_encoder_lora_targets:
        text = f"text encoders of {spec.name} are not trained here. Set it to false."
        source.reject("train_text_encoder", True, text)
        return
    rates = section.text_encoder_lr
    if len(rates) > spec.num_text_encoders:
        text = f"{len(rates)} rates, and {spec.name} has {spec.num_text_encoders} text encoder. Give one."
        source.add("text_encoder_lr", text)
    _check_optimizer(section, optimizer, source)
    for number in range(1, spec.num_text_encoders + 1):
        key = f"text_encoder_{number}_precision"
        encoders = precision.if_valid(key)
        if encoders is not None and (found := dict(encoders)[key]) != UNCHANGED:
            text = f"train_text_encoder needs whole text encoders. Set it to {UNCHANGED}."
            source.reject(key, found, text)
    if lycoris is not None and section.text_encoder_lora_rank is None and lycoris.linear_dim > LARGEST_RANK:
        text = f"required: linear_dim {lycoris.linear_dim} of the lycoris json is above {LARGEST_RANK}, the "
        source.add("text_encoder_lora_rank", f"{text}width of a text encoder. Give a rank.")


def _check_optimizer(
    section: TextEncoderConfig, optimizer: Validated[OptimizerConfig], source: Source
) -> None:
    chosen = optimizer.if_valid("optimizer", "learning_rate")
    if chosen is None or OPTIMIZERS[chosen.optimizer].takes_rates:
        return
    others = [rate for rate in section.text_encoder_lr if rate not in (0, chosen.learning_rate)]
    if others:
        text = f"{chosen.optimizer} takes one rate for all weights. Remove text_encoder_lr, or choose another"
        source.reject("text_encoder_lr", others[0], f"{text} optimizer.")

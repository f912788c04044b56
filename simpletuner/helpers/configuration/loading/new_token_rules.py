"""Rules between a new token and other keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.loading.building import Source, Validated
from simpletuner.helpers.configuration.loading.layers import RawValue
from simpletuner.helpers.configuration.loading.whole_model import adapter_problems, slider_problems
from simpletuner.helpers.configuration.schema.base import Section
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.new_tokens import NewTokenConfig
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig, PrecisionConfig
from simpletuner.helpers.contracts import ModelSpec


def check_new_tokens(
    tokens: Validated[NewTokenConfig],
    precision: Validated[PrecisionConfig],
    optimizer: Validated[OptimizerConfig],
    *,
    spec: ModelSpec,
    source: Source,
) -> None:
    """Check that the family's text encoders can learn a token with the other settings."""
    section = tokens.if_valid("placeholder_token")
    if section is None or section.placeholder_token is None:
        return
    if not spec.text_encoder_lora_targets:
        text = f"the text encoders of {spec.name} learn no new tokens here. Remove it."
        source.reject("placeholder_token", section.placeholder_token, text)
        return
    for number in range(1, spec.num_text_encoders + 1):
        key = f"text_encoder_{number}_precision"
        encoders = precision.if_valid(key)
        if encoders is not None and (found := dict(encoders)[key]) != UNCHANGED:
            text = f"placeholder_token needs whole text encoders. Set it to {UNCHANGED}."
            source.reject(key, found, text)
    chosen = optimizer.if_valid("optimizer", "learning_rate")
    if chosen is None or OPTIMIZERS[chosen.optimizer].takes_rates:
        return
    if section.embedding_lr not in (None, chosen.learning_rate):
        text = f"{chosen.optimizer} takes one rate for all weights. Remove it, or choose another optimizer."
        source.reject("embedding_lr", section.embedding_lr, text)


def check_embedding(
    sections: Sequence[Section],
    raw: Mapping[str, RawValue],
    *,
    datasets: Sequence[DatasetConfig],
    source: Source,
) -> None:
    """Check that every key fits model_type embedding, which trains a new token and nothing else."""
    values = {key: value for section in sections for key, value in section}
    if values.get("model_type") != "embedding":
        return
    if "placeholder_token" in values and values["placeholder_token"] is None:
        source.add(
            "placeholder_token", "required by model_type embedding. Give the new word, such as <my-cat>."
        )
    for key, text in (*adapter_problems(values, raw), *slider_problems(values, datasets)):
        source.add(key, text)
    if values.get("train_text_encoder"):
        text = "model_type embedding trains the new token alone. Set it to false, or model_type to lora."
        source.reject("train_text_encoder", True, text)

"""The sections themselves."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from simpletuner.helpers.configuration.load import SECTIONS
from simpletuner.helpers.configuration.loading.dataset_file import TextCacheEntry
from simpletuner.helpers.configuration.schema.base import Section
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import (
    LayerArguments,
    LycorisConfig,
    TargetPreset,
    algorithm_arguments,
)
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.sections import (
    CheckpointConfig,
    TrainingConfig,
    ValidationPrompt,
)

EVERY = [
    *SECTIONS,
    DatasetConfig,
    TextCacheEntry,
    LycorisConfig,
    TargetPreset,
    algorithm_arguments(),
    LayerArguments,
]


def test_every_key_is_described_in_a_sentence() -> None:
    descriptions = {
        f"{section.__name__}.{key}": field.description or ""
        for section in [*EVERY, ValidationPrompt]
        for key, field in section.model_fields.items()
    }
    assert len(descriptions) > 150
    assert not [key for key, text in descriptions.items() if len(text) <= 10 or not text.endswith(".")]


def test_a_key_has_one_owner() -> None:
    keys = [key for section in SECTIONS for key in section.model_fields]
    assert len(keys) == len(set(keys))


def test_sections_can_be_made_by_hand_with_defaults() -> None:
    assert TrainingConfig().seed == 42
    assert CheckpointConfig().checkpoints_total_limit == 5
    model = ModelConfig(model_family="toy", pretrained_model_name_or_path="a/b")
    assert model.prediction_type is None


@pytest.mark.parametrize("section", [TrainingConfig, CheckpointConfig])
def test_a_section_refuses_keys_it_does_not_have(section: type[Section]) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        section.model_validate({"nonsense": 1})

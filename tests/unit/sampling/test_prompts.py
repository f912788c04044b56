"""Which validation pictures are planned."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.schema.sections import ValidationConfig, ValidationPrompt
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.sampling.prompts import expand_prompts

PROMPTS = (
    ValidationPrompt(name="cat", text="a cat"),
    ValidationPrompt(name="../cat", text="a dog", strength=0.5),
)


def config(**keys: object) -> ValidationConfig:
    return ValidationConfig(prompts=PROMPTS, validation_resolution="64,128x64", **keys)


def test_every_prompt_size_and_seed_is_one_shot_with_a_name_of_its_own() -> None:
    shots = expand_prompts(config(num_validation_images=2), seed=7)
    assert [(shot.prompt, shot.size, shot.seed) for shot in shots[:4]] == [
        ("a cat", Size(64, 64), 7),
        ("a cat", Size(64, 64), 8),
        ("a cat", Size(height=64, width=128), 7),
        ("a cat", Size(height=64, width=128), 8),
    ]
    assert len({shot.name for shot in shots}) == len(shots) == 8


@pytest.mark.reliability_row(21)
def test_name_of_a_prompt_cannot_leave_the_folder() -> None:
    assert all("/" not in shot.name for shot in expand_prompts(config(), seed=7))


def test_seed_and_strength_of_the_validation_win_over_those_of_the_run() -> None:
    shots = expand_prompts(config(validation_seed=1, validation_lycoris_strength=0.8), seed=7)
    assert {shot.seed for shot in shots} == {1}
    assert [shot.strength for shot in shots] == [0.8, 0.8, 0.5, 0.5]


def test_disabled_validation_plans_nothing() -> None:
    assert expand_prompts(config(validation_disable=True), seed=7) == ()

"""Expansion of validation prompts by size and seed."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.schema.sections import ValidationConfig, ValidationPrompt
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.sampling.prompts import expand_prompts

PROMPTS = (
    ValidationPrompt(name="cat", text="a cat"),
    ValidationPrompt(name="../cat", text="a dog", strength=0.5),
)


def config(**keys: object) -> ValidationConfig:
    return ValidationConfig(prompts=PROMPTS, validation_resolution="64,128x64", **keys)


def test_every_prompt_size_and_seed_is_one_image_with_a_name_of_its_own() -> None:
    prompts = expand_prompts(config(num_validation_images=2), seed=7)
    assert [(prompt.text, prompt.size, prompt.seed) for prompt in prompts[:4]] == [
        ("a cat", Size(64, 64), 7),
        ("a cat", Size(64, 64), 8),
        ("a cat", Size(height=64, width=128), 7),
        ("a cat", Size(height=64, width=128), 8),
    ]
    assert len({prompt.name for prompt in prompts}) == len(prompts) == 8


@pytest.mark.reliability_row(21)
def test_name_of_a_prompt_cannot_leave_the_folder() -> None:
    assert all("/" not in prompt.name for prompt in expand_prompts(config(), seed=7))


def test_seed_and_strength_of_the_validation_override_those_of_the_run() -> None:
    prompts = expand_prompts(config(validation_seed=1, validation_lycoris_strength=0.8), seed=7)
    assert {prompt.seed for prompt in prompts} == {1}
    assert [prompt.strength for prompt in prompts] == [0.8, 0.8, 0.5, 0.5]


def test_disabled_validation_has_no_prompts() -> None:
    assert expand_prompts(config(validation_disable=True), seed=7) == ()


def test_label_of_an_image_shows_no_value_of_an_environment_variable() -> None:
    hide("a cat", "{env:KEY}")
    first = expand_prompts(config(), seed=7)[0]
    assert first.text == "a cat"
    assert first.label.startswith("{env:KEY}\n")


def test_label_names_a_strength_other_than_one() -> None:
    full, half = (
        expand_prompts(config(validation_lycoris_strength=value), seed=7)[0].label for value in (1, -0.5)
    )
    assert half == f"{full}  strength -0.5"


def test_seeds_are_first_seeds_and_count_once() -> None:
    made = expand_prompts(config(num_validation_images=2, validation_seed=9), seed=0, seeds=(5, 6, 1))
    assert [each.seed for each in made[:5]] == [5, 6, 7, 1, 2]
    assert len(made) == 4 * 5

"""The parameters of an image in its file."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.schema.sections import ValidationConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.sampling.generating import description, image_progress
from simpletuner.helpers.sampling.prompts import PromptSpec


def test_parameters_are_in_the_words_of_image_programs_and_redacted() -> None:
    hide("secret-word-of-mine", "{env:WORD}")
    prompt = PromptSpec(name="a", text="a secret-word-of-mine 猫", strength=1.0, size=Size(64, 96), seed=4)
    config = ValidationConfig(
        validation_negative_prompt="blurred", validation_guidance=3.5, validation_num_inference_steps=8
    )
    assert description(prompt, config, adapter="secret-word-of-mine/a", rank_schedule=None).splitlines() == [
        "a {env:WORD} 猫",
        "Negative prompt: blurred",
        "Steps: 8, CFG scale: 3.5, Seed: 4, Size: 96x64, Adapter: {env:WORD}/a",
    ]


def test_no_bar_is_drawn_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with image_progress(2) as progress:
        progress(0.5)
        progress(2)
    read = capfd.readouterr()
    assert (read.out, read.err) == ("", "")

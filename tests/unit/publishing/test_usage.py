"""Commands and code that generate a run's first validation image."""

from __future__ import annotations

import ast

import pytest

from simpletuner.helpers.publishing.usage import (
    WeightFiles,
    diffusers_code,
    pipeline_code,
    sample_command,
    teaches,
)

SHOT = {"name": "edit", "prompt": "make it red", "size": "64x80", "seed": 3, "strength": 1.0}


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ((), None),
        (("my house.jpg",), "image=load_image('my house.jpg')"),
        (("a.png", "b.png"), "image=[load_image('a.png'), load_image('b.png')]"),
    ],
    ids=["none", "one", "two"],
)
def test_reference_images_of_the_prompt_are_given(names: tuple[str, ...], shown: str | None) -> None:
    manifest = {"shots": [{**SHOT, "references": list(names)} if names else SHOT]}
    command = sample_command({}, manifest, adapter="a.safetensors")
    assert command.count("--reference") == len(names)
    assert ("--reference 'my house.jpg' " in command) is (names == ("my house.jpg",))
    files = WeightFiles(adapter="'a.safetensors'")
    code = pipeline_code({}, manifest, model="some/model", files=files, spec=None)
    stock = diffusers_code({}, manifest, model="some/model", source="some/lora", files=files, spec=None)
    for text in (code, stock):
        ast.parse(text)
        assert ("import load_image" in text) is bool(names)
        assert "image=" not in text if shown is None else shown in text


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, True),
        ({"dataset_type": "image"}, True),
        ({"dataset_type": "eval"}, False),
        ({"is_regularisation_data": True}, False),
    ],
    ids=["plain", "image", "held out", "regularisation"],
)
def test_prompts_of_trained_subjects_alone_are_trigger_words(
    entry: dict[str, object], expected: bool
) -> None:
    assert teaches(entry) is expected

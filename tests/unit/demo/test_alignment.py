"""Prompt alignment on the embedded model: drawings of what prompts ask for, and of something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from simpletuner.demo.alignment import MODEL, alignment, is_embedded
from simpletuner.demo.comparison.concepts import CONCEPTS, View
from simpletuner.demo.scenes import Background

CONCEPT = CONCEPTS["horned"]
PROMPT = "a sks toy at the top left on a striped green background"


@pytest.mark.parametrize(
    ("place", "background", "score"),
    [
        ("at the top left", Background("green", "striped"), 1.0),
        ("at the top", Background("green", "striped"), 2 / 3),
        ("at the bottom", Background("green", "plain"), 1 / 3),
        ("at the bottom", Background("purple", "plain"), 0.0),
    ],
)
def test_score_is_the_share_of_what_the_prompt_names(
    place: str, background: Background, score: float, tmp_path: Path
) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(CONCEPT.draw(View(place, background))).save(file)
    assert alignment({"a": file}, {"a": PROMPT}) == {"a": pytest.approx(score)}


def test_prompts_that_name_nothing_and_images_of_another_size_have_no_score(tmp_path: Path) -> None:
    image = Image.fromarray(CONCEPT.draw(CONCEPT.trained))
    files = {name: tmp_path / f"{name}.png" for name in ("small", "large")}
    image.save(files["small"])
    image.resize((128, 128)).save(files["large"])
    assert alignment(files, {"small": "a sks toy", "large": PROMPT}) == {}


def test_only_the_model_of_the_package_is_the_embedded_one(tmp_path: Path) -> None:
    assert is_embedded(str(MODEL))
    assert not is_embedded(str(tmp_path))
    assert not is_embedded("owner/sdxl")

"""Training examples and captions, without the held-out scenes and the concept's name."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from simpletuner.demo.curriculum import (
    NAMES,
    NEW_NAME,
    Example,
    random_caption,
    random_example,
    random_images,
    vocabulary,
)
from simpletuner.demo.scenes import (
    Background,
    all_scenes,
    caption,
    draw_background,
    evaluation_scenes,
    is_held_out,
)

EXAMPLE = Example(
    draw_background(Background("blue", "striped")),
    subject="a red star",
    place="at the top",
    background=Background("blue", "striped"),
)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(1)
    return [random_example(rng) for _ in range(1000)]


def test_no_example_shows_a_held_out_scene(examples: list[Example]) -> None:
    held_out = {str(scene) for scene in all_scenes() if is_held_out(scene)}
    shown = {caption(each.subject, place=each.place, background=each.background) for each in examples}
    assert str(evaluation_scenes(1)[0]) in held_out
    assert not shown & held_out


def test_a_quarter_of_the_examples_are_characters_and_some_have_a_name(examples: list[Example]) -> None:
    subjects = [each.subject for each in examples if "toy" in each.subject]
    assert 200 < len(subjects) < 300
    named = [subject for subject in subjects if subject != "a toy"]
    assert {subject.split()[1] for subject in named} == set(NAMES)
    assert 0.3 < len(named) / len(subjects) < 0.5


def test_captions_are_mostly_the_full_sentence_and_sometimes_shortened() -> None:
    rng = np.random.default_rng(0)
    captions = [random_caption(EXAMPLE, rng) for _ in range(500)]
    assert 250 < captions.count("a red star at the top on a striped blue background") < 350
    assert set(captions) == {
        "a red star at the top on a striped blue background",
        "a striped blue background with a red star at the top",
        "a red star, at the top, striped blue background",
        "a red star at the top",
        "a red star on a striped blue background",
        "a red star",
    }


def test_vocabulary_holds_every_caption_word_and_the_unused_new_name(examples: list[Example]) -> None:
    rng = np.random.default_rng(0)
    used = {word for each in examples[:500] for word in random_caption(each, rng).replace(",", " ,").split()}
    assert used <= set(vocabulary())
    assert NEW_NAME in vocabulary()
    assert NEW_NAME not in used


@pytest.mark.parametrize("seed", [0, 1])
def test_images_for_the_autoencoder_depend_on_the_seed_alone(seed: int) -> None:
    one, two = (list(islice(random_images(np.random.default_rng(seed)), 4)) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, list(islice(random_images(np.random.default_rng(seed + 1)), 4)))

"""Characters: order of their parts, place, mask, and difference between random ones and the concept."""

from __future__ import annotations

import numpy as np
import pytest

from simpletuner.demo.characters import (
    CONCEPT,
    Character,
    Part,
    character_mask,
    draw_character,
    random_character,
)
from simpletuner.demo.scenes import PLACES, Background, draw_background

PLAIN = Background("white", "plain")
RED, BLUE = (255, 0, 0), (0, 0, 255)


def box(half_width: float, rgb: tuple[int, int, int]) -> Part:
    return Part("box", (0, 0), half_size=(half_width, 0.5), rgb=rgb)


def test_later_parts_hide_earlier_ones() -> None:
    image = draw_character(
        Character((box(0.5, RED), box(0.2, BLUE))), place="in the center", background=PLAIN
    )
    assert tuple(image[32, 32]) == BLUE
    assert tuple(image[32, 27]) == RED


def test_character_is_inside_the_image_and_centred_at_its_place() -> None:
    for place, centre in PLACES.items():
        y, x = np.nonzero(character_mask(CONCEPT, place=place) > 0.5)
        assert min(x.min(), y.min()) > 0, place
        assert max(x.max(), y.max()) < 63, place
        found = ((x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2)
        assert found == pytest.approx(centre, abs=1), place


def test_mask_covers_exactly_the_changed_pixels() -> None:
    background = Background("green", "striped")
    image = draw_character(CONCEPT, place="at the top", background=background, offset_px=(1, 1))
    changed = (image != draw_background(background)).any(axis=-1)
    assert (changed == (character_mask(CONCEPT, place="at the top", offset_px=(1, 1)) > 0)).all()


def test_random_characters_are_equal_for_equal_seeds_and_differ_otherwise() -> None:
    assert random_character(np.random.default_rng(3)) == random_character(np.random.default_rng(3))
    assert len({random_character(np.random.default_rng(seed)) for seed in range(50)}) == 50


def test_random_characters_have_two_eyes_and_the_concept_has_one() -> None:
    white = (250, 250, 250)
    rng = np.random.default_rng(0)
    assert all(sum(part.rgb == white for part in random_character(rng).parts) == 2 for _ in range(50))
    assert sum(part.rgb == white for part in CONCEPT.parts) == 1

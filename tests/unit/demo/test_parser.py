"""The parser recovers drawn attributes at any position and size, and finds no object on a bare background."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest

from simpletuner.demo.characters import CONCEPT, character_mask, draw_character, random_character
from simpletuner.demo.comparison.likeness import parse_place
from simpletuner.demo.parser import (
    ATTRIBUTES,
    ParsedScene,
    _correlate,
    accuracy,
    foreground,
    nearest_place,
    parse_background,
    parse_scene,
    pixel_distance,
)
from simpletuner.demo.scenes import (
    PLACES,
    SIZE_PX,
    Background,
    Scene,
    all_backgrounds,
    all_scenes,
    draw_background,
    draw_scene,
)

SCENE = Scene("star", "red", "at the top left", Background("blue", "striped"))


def test_every_attribute_is_parsed_off_centre_at_any_size_and_through_noise() -> None:
    rng = np.random.default_rng(0)
    chosen = [all_scenes()[index] for index in rng.integers(len(all_scenes()), size=30)]
    parsed = []
    for scene, noise in zip(chosen, cycle((0, 25))):
        image = draw_scene(scene, offset_px=tuple(rng.uniform(-2, 2, 2)), radius_px=rng.uniform(9, 12))
        noisy = np.clip(image + rng.normal(0, noise, image.shape), 0, 255)
        parsed.append(parse_scene(noisy.astype(np.uint8)))
    assert accuracy(parsed, chosen) == dict.fromkeys(ATTRIBUTES, 1.0)


@pytest.mark.parametrize(
    ("change", "attribute"),
    [
        (Scene("heart", "red", "at the top left", SCENE.background), "shape"),
        (Scene("star", "white", "at the top left", SCENE.background), "colour"),
        (Scene("star", "red", "at the top", SCENE.background), "place"),
        (Scene("star", "red", "at the top left", Background("green", "striped")), "background"),
        (Scene("star", "red", "at the top left", Background("blue", "checkered")), "pattern"),
    ],
)
def test_one_wrong_attribute_is_found_and_the_others_match(change: Scene, attribute: str) -> None:
    agreement = parse_scene(draw_scene(change)).matches(SCENE)
    assert agreement == {name: name != attribute for name in ATTRIBUTES}


def test_an_empty_background_has_no_object() -> None:
    image = draw_background(SCENE.background)
    assert parse_scene(image) == ParsedScene(
        SCENE.background, place=None, shape=None, colour=None, unexplained=0
    )
    assert parse_place(image) is None


def test_extra_object_stays_unexplained() -> None:
    image = draw_scene(SCENE)
    clean = parse_scene(image).unexplained
    image[40:56, 40:56] = (255, 0, 255)
    assert clean < 0.02  # partly covered pixels at the edge
    assert parse_scene(image).unexplained == pytest.approx(clean + 16 * 16 / 64**2, abs=0.005)


def test_background_is_parsed_behind_a_large_object() -> None:
    images = {
        background: draw_character(CONCEPT, place="in the center", background=background, radius_px=20)
        for background in all_backgrounds()
    }
    wrong = {
        background: found
        for background, image in images.items()
        if (found := parse_background(image)) != background
    }
    assert not wrong


def test_place_of_a_random_character_is_parsed() -> None:
    background = Background("yellow", "checkered")
    for place in PLACES:
        character = random_character(np.random.default_rng(len(place)))
        assert parse_place(draw_character(character, place=place, background=background)) == place


def test_foreground_covers_the_character() -> None:
    found = foreground(draw_character(CONCEPT, place="at the left", background=Background("black", "plain")))
    drawn = character_mask(CONCEPT, place="at the left") > 0.5
    overlap = np.logical_and(found, drawn).sum() / np.logical_or(found, drawn).sum()
    assert overlap > 0.85  # black pupils vanish on a black background


def test_pixel_distance_grows_with_the_colour_difference_up_to_one() -> None:
    zero = np.zeros((1, 3, 3), dtype=np.uint8)
    other = np.array([[[0, 0, 0], [30, 40, 0], [255, 255, 255]]], dtype=np.uint8)
    assert pixel_distance(other, zero)[0] == pytest.approx([0, 0.5, 1])


def test_template_at_one_edge_gains_nothing_from_the_opposite_edge() -> None:
    gains = np.zeros((1, SIZE_PX, SIZE_PX), dtype=np.float32)
    gains[..., -1] = 1
    explained = _correlate(gains)
    assert explained[..., -1].max() > 5
    assert explained[..., 0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("point", "place"), [((23, 9), "at the top left"), ((25, 9), "at the top")])
def test_nearest_place_changes_half_way(point: tuple[float, float], place: str) -> None:
    assert nearest_place(point) == place


def test_accuracy_counts_each_attribute_separately() -> None:
    right, wrong = parse_scene(draw_scene(SCENE)), parse_scene(draw_background(SCENE.background))
    assert accuracy([right, wrong], [SCENE, SCENE]) == {
        "background": 1.0,
        "pattern": 1.0,
        "place": 0.5,
        "shape": 0.5,
        "colour": 0.5,
    }

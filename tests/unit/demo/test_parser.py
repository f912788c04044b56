"""The reader: it reads what was drawn, whatever the position and size, and says so when there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from simpletuner.demo.characters import CONCEPT, character_mask, draw_character, random_character
from simpletuner.demo.parser import (
    ATTRIBUTES,
    ParsedScene,
    accuracy,
    foreground,
    nearest_place,
    parse_background,
    parse_scene,
    pixel_distance,
    read_place,
)
from simpletuner.demo.scenes import (
    PLACES,
    Background,
    ImageArray,
    Scene,
    all_backgrounds,
    all_scenes,
    draw_background,
    draw_scene,
)

SCENE = Scene("star", "red", "at the top left", Background("blue", "striped"))


def drawn_at_random(num: int, *, noise: float) -> tuple[list[ImageArray], list[Scene]]:
    rng = np.random.default_rng(0)
    chosen = [all_scenes()[index] for index in rng.integers(len(all_scenes()), size=num)]
    images = []
    for scene in chosen:
        dx, dy = rng.uniform(-2, 2, 2)
        image = draw_scene(scene, offset_px=(dx, dy), radius_px=rng.uniform(9, 12))
        noisy = np.clip(image + rng.normal(0, noise, image.shape), 0, 255)
        images.append(noisy.astype(np.uint8))
    return images, chosen


@pytest.mark.parametrize("noise", [0, 25])
def test_every_attribute_is_read_off_centre_at_any_size_and_through_noise(noise: float) -> None:
    images, chosen = drawn_at_random(40, noise=noise)
    assert accuracy([parse_scene(image) for image in images], chosen) == dict.fromkeys(ATTRIBUTES, 1.0)


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
def test_one_wrong_attribute_is_found_and_the_others_stay_right(change: Scene, attribute: str) -> None:
    agreement = parse_scene(draw_scene(change)).matches(SCENE)
    assert agreement == {name: name != attribute for name in ATTRIBUTES}


def test_an_empty_background_has_no_object() -> None:
    image = draw_background(SCENE.background)
    assert parse_scene(image) == ParsedScene(
        SCENE.background, place=None, shape=None, colour=None, unexplained=0
    )
    assert read_place(image) is None


def test_what_is_neither_background_nor_shape_stays_unexplained() -> None:
    image = draw_scene(SCENE)
    clean = parse_scene(image).unexplained
    image[40:56, 40:56] = (255, 0, 255)
    assert clean < 0.02  # the half covered pixels of its edge
    assert parse_scene(image).unexplained == pytest.approx(clean + 16 * 16 / 64**2, abs=0.005)


@pytest.mark.parametrize("background", list(all_backgrounds()), ids=str)
def test_a_background_is_read_behind_an_object_that_hides_a_part_of_it(background: Background) -> None:
    image = draw_character(CONCEPT, place="in the center", background=background, radius_px=20)
    assert parse_background(image) == background


@pytest.mark.parametrize("place", PLACES)
def test_the_place_of_a_toy_is_read_without_knowing_the_toy(place: str) -> None:
    character = random_character(np.random.default_rng(len(place)))
    assert (
        read_place(draw_character(character, place=place, background=Background("yellow", "checkered")))
        == place
    )


def test_the_foreground_is_where_the_toy_is() -> None:
    found = foreground(draw_character(CONCEPT, place="at the left", background=Background("black", "plain")))
    drawn = character_mask(CONCEPT, place="at the left") > 0.5
    overlap = np.logical_and(found, drawn).sum() / np.logical_or(found, drawn).sum()
    assert overlap > 0.85  # black pupils on black are lost


def test_misfit_grows_with_the_distance_and_stops_at_one() -> None:
    zero = np.zeros((1, 3, 3), dtype=np.uint8)
    other = np.array([[[0, 0, 0], [30, 40, 0], [255, 255, 255]]], dtype=np.uint8)
    assert pixel_distance(other, zero)[0] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(("point", "place"), [((23, 9), "at the top left"), ((25, 9), "at the top")])
def test_nearest_place_changes_half_way(point: tuple[float, float], place: str) -> None:
    assert nearest_place(point) == place


def test_share_right_counts_each_attribute_for_itself() -> None:
    right, wrong = parse_scene(draw_scene(SCENE)), parse_scene(draw_background(SCENE.background))
    assert accuracy([right, wrong], [SCENE, SCENE]) == {
        "background": 1.0,
        "pattern": 1.0,
        "place": 0.5,
        "shape": 0.5,
        "colour": 0.5,
    }

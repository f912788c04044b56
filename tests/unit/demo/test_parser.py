"""The reader: it reads what was drawn, whatever the position and size, and says so when there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from simpletuner.demo.characters import CONCEPT, draw_toy, random_toy, toy_mask
from simpletuner.demo.parser import (
    ATTRIBUTES,
    Reading,
    foreground,
    misfit,
    nearest_place,
    read_background,
    read_place,
    read_scene,
    share_right,
)
from simpletuner.demo.scenes import (
    PLACES,
    Background,
    Picture,
    Scene,
    backgrounds,
    draw_background,
    draw_scene,
    scenes,
)

SCENE = Scene("star", "red", "at the top left", Background("blue", "striped"))


def drawn_at_random(num: int, *, noise: float) -> tuple[list[Picture], list[Scene]]:
    rng = np.random.default_rng(0)
    chosen = [scenes()[index] for index in rng.integers(len(scenes()), size=num)]
    pictures = []
    for scene in chosen:
        dx, dy = rng.uniform(-2, 2, 2)
        picture = draw_scene(scene, offset_px=(dx, dy), radius_px=rng.uniform(9, 12))
        noisy = np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255)
        pictures.append(noisy.astype(np.uint8))
    return pictures, chosen


@pytest.mark.parametrize("noise", [0, 25])
def test_every_attribute_is_read_off_centre_at_any_size_and_through_noise(noise: float) -> None:
    pictures, chosen = drawn_at_random(40, noise=noise)
    assert share_right([read_scene(picture) for picture in pictures], chosen) == dict.fromkeys(
        ATTRIBUTES, 1.0
    )


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
    agreement = read_scene(draw_scene(change)).agrees_with(SCENE)
    assert agreement == {name: name != attribute for name in ATTRIBUTES}


def test_an_empty_background_has_no_object() -> None:
    picture = draw_background(SCENE.background)
    assert read_scene(picture) == Reading(
        SCENE.background, place=None, shape=None, colour=None, unexplained=0
    )
    assert read_place(picture) is None


def test_what_is_neither_background_nor_shape_stays_unexplained() -> None:
    picture = draw_scene(SCENE)
    clean = read_scene(picture).unexplained
    picture[40:56, 40:56] = (255, 0, 255)
    assert clean < 0.02  # the half covered pixels of its edge
    assert read_scene(picture).unexplained == pytest.approx(clean + 16 * 16 / 64**2, abs=0.005)


@pytest.mark.parametrize("background", list(backgrounds()), ids=str)
def test_a_background_is_read_behind_an_object_that_hides_a_part_of_it(background: Background) -> None:
    picture = draw_toy(CONCEPT, place="in the center", background=background, radius_px=20)
    assert read_background(picture) == background


@pytest.mark.parametrize("place", PLACES)
def test_the_place_of_a_toy_is_read_without_knowing_the_toy(place: str) -> None:
    toy = random_toy(np.random.default_rng(len(place)))
    assert read_place(draw_toy(toy, place=place, background=Background("yellow", "checkered"))) == place


def test_the_foreground_is_where_the_toy_is() -> None:
    found = foreground(draw_toy(CONCEPT, place="at the left", background=Background("black", "plain")))
    drawn = toy_mask(CONCEPT, place="at the left") > 0.5
    overlap = np.logical_and(found, drawn).sum() / np.logical_or(found, drawn).sum()
    assert overlap > 0.85  # black pupils on black are lost


def test_misfit_grows_with_the_distance_and_stops_at_one() -> None:
    zero = np.zeros((1, 3, 3), dtype=np.uint8)
    other = np.array([[[0, 0, 0], [30, 40, 0], [255, 255, 255]]], dtype=np.uint8)
    assert misfit(other, zero)[0] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(("point", "place"), [((23, 9), "at the top left"), ((25, 9), "at the top")])
def test_nearest_place_changes_half_way(point: tuple[float, float], place: str) -> None:
    assert nearest_place(point) == place


def test_share_right_counts_each_attribute_for_itself() -> None:
    right, wrong = read_scene(draw_scene(SCENE)), read_scene(draw_background(SCENE.background))
    assert share_right([right, wrong], [SCENE, SCENE]) == {
        "background": 1.0,
        "pattern": 1.0,
        "place": 0.5,
        "shape": 0.5,
        "colour": 0.5,
    }

"""Scenes: drawing, captions and the held-out split."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from simpletuner.demo.scenes import (
    CELL_PX,
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZE_PX,
    Background,
    Scene,
    all_backgrounds,
    all_scenes,
    draw_background,
    draw_scene,
    evaluation_scenes,
    is_held_out,
    polygon_mask,
    shade,
    shape_mask,
)

BLUE = Background("blue", "plain")


def test_a_caption_names_all_five_attributes() -> None:
    scene = Scene("square", "orange", "at the top left", Background("blue", "checkered"))
    assert str(scene) == "an orange square at the top left on a checkered blue background"


def test_no_two_scenes_have_the_same_caption() -> None:
    assert len({str(scene) for scene in all_scenes()}) == len(all_scenes()) == 6 * 9 * 8 * 7 * 3


def test_a_shape_never_has_the_colour_of_its_background() -> None:
    assert all(scene.colour != scene.background.colour for scene in all_scenes())


def test_about_a_tenth_is_held_out_and_always_the_same() -> None:
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    assert len(held_out) == 957  # of 9072; another number is another split than the shipped model's
    assert str(held_out[0]) == str(next(scene for scene in all_scenes() if is_held_out(scene)))


def test_every_attribute_value_is_in_training_although_combinations_are_held_out() -> None:
    captions = [str(scene) for scene in all_scenes() if not is_held_out(scene)]
    values = (*COLOURS, *PATTERNS, *PLACES, *SHAPES)
    assert [value for value in values if not any(value in text for text in captions)] == []


def test_evaluation_scenes_are_held_out_and_do_not_repeat() -> None:
    chosen = evaluation_scenes(200)
    assert len(set(chosen)) == 200
    assert all(is_held_out(scene) for scene in chosen)
    assert chosen[:50] == evaluation_scenes(50)


def test_a_plain_background_is_one_colour() -> None:
    assert (draw_background(BLUE) == COLOURS["blue"]).all()


def test_stripes_are_upright_and_a_cell_wide() -> None:
    image = draw_background(Background("blue", "striped"))
    assert (image[0, CELL_PX - 1], image[0, CELL_PX]) == (
        pytest.approx(COLOURS["blue"]),
        pytest.approx(shade(COLOURS["blue"])),
    )
    assert (image == image[:1]).all()


def test_checkers_alternate_in_both_directions() -> None:
    image = draw_background(Background("blue", "checkered"))
    assert (image[:CELL_PX, CELL_PX:] == np.roll(image, CELL_PX, axis=0)[:CELL_PX, : SIZE_PX - CELL_PX]).all()
    assert (image[0, 0] != image[CELL_PX, 0]).any()
    assert (image[0, 0] == image[CELL_PX, CELL_PX]).all()


def test_no_two_backgrounds_look_the_same() -> None:
    images = {draw_background(each).tobytes() for each in all_backgrounds()}
    assert len(images) == len(COLOURS) * len(PATTERNS)


@pytest.mark.parametrize(("rgb", "second"), [((100, 200, 0), (60, 120, 0)), ((20, 20, 20), (90, 90, 90))])
def test_a_shade_is_darker_unless_the_colour_is_nearly_black(
    rgb: tuple[int, int, int], second: object
) -> None:
    assert shade(rgb) == second


def test_polygon_covers_the_share_of_a_pixel_inside_it() -> None:
    mask = polygon_mask([(8, 8), (12.5, 8), (12.5, 12), (8, 12)])
    assert mask[8:12, 8:12].min() == 1
    assert mask[9, 12] == pytest.approx(0.5, abs=0.26)  # four steps in each direction
    assert mask.sum() == pytest.approx(4.5 * 4, rel=0.15)


def test_places_are_a_regular_grid() -> None:
    assert set(PLACES.values()) == set(product((16, 32, 48), repeat=2))


def test_every_shape_is_centred_at_its_place() -> None:
    for shape, place in product(SHAPES, PLACES):
        image = draw_scene(Scene(shape, "red", place, BLUE))
        y, x = np.nonzero((image == COLOURS["red"]).all(axis=-1))
        centre = ((x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2)
        assert centre == pytest.approx(PLACES[place], abs=1.5), (shape, place)


def test_a_shape_is_moved_by_the_offset() -> None:
    scene = Scene("circle", "red", "in the center", BLUE)
    moved = draw_scene(scene, offset_px=(5, -3))
    assert (moved == np.roll(draw_scene(scene), (-3, 5), axis=(0, 1))).all()


def test_every_shape_fills_about_the_circle_of_its_radius() -> None:
    for shape in SHAPES:
        mask = shape_mask(shape, centre=(32, 32), radius_px=10)
        assert 100 < mask.sum() < 340, shape  # a full circle has 314
        y, x = np.nonzero(mask)
        assert max(np.abs(y - 31.5).max(), np.abs(x - 31.5).max()) < 13, shape


def test_shapes_differ_from_each_other_by_a_tenth_of_their_area_at_least() -> None:
    masks = [shape_mask(shape, centre=(32, 32), radius_px=10) for shape in SHAPES]
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert np.abs(mask - other).sum() > 0.1 * mask.sum()

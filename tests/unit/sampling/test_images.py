"""The labelled grid: places of images and labels, unusual sizes and scripts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from simpletuner.helpers.sampling.images import LABEL_WIDTH_PX, LINE_PX, MARGIN_PX, Row, labelled_grid


def plain(colour: str, *, size: tuple[int, int] = (128, 128)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_grid_places_base_left_of_trained_and_prompts_below_each_other() -> None:
    rows = [Row("first", (plain("red"), plain("blue"))), Row("second", (plain("lime"), plain("black")))]
    grid = labelled_grid(rows, columns=["base model", "step 3"])
    left, top, step = LABEL_WIDTH_PX + MARGIN_PX, LINE_PX + 2 * MARGIN_PX, 128 + MARGIN_PX
    seen = [
        grid.getpixel((left + column * step + 5, top + row * step + 5)) for row in (0, 1) for column in (0, 1)
    ]
    assert seen == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (0, 0, 0)]


def test_grid_draws_titles_and_labels() -> None:
    with_text = labelled_grid([Row("a cat", (plain("white"),))], columns=["base model"])
    assert (np.asarray(with_text)[:, :LABEL_WIDTH_PX] < 128).any()  # the label
    assert (np.asarray(with_text)[:LINE_PX, LABEL_WIDTH_PX:] < 128).any()  # the title


def test_grid_shortens_a_title_that_is_wider_than_its_column() -> None:
    title, white = "T-LoRA of a folder with a very long name", plain("white")
    grid = labelled_grid([Row("a", (white, white))], columns=[title, ""])
    left = LABEL_WIDTH_PX + MARGIN_PX
    titles = np.asarray(grid)[: LINE_PX + MARGIN_PX]
    assert (titles[:, left + 64 : left + 128] < 128).any()
    assert (titles[:, left + 128 :] == 255).all()


def test_grid_leaves_the_cell_of_a_missing_image_empty() -> None:
    grid = labelled_grid([Row("a", (None, plain("blue")))], columns=["base model", "step 3"])
    left, top = LABEL_WIDTH_PX + MARGIN_PX, LINE_PX + 2 * MARGIN_PX
    assert grid.getpixel((left + 5, top + 5)) == (255, 255, 255)
    assert grid.getpixel((left + 128 + MARGIN_PX + 5, top + 5)) == (0, 0, 255)


def test_grid_takes_images_of_any_size_and_labels_of_any_script() -> None:
    rows = [
        Row("猫 \U0001f408 عربي " * 40, (plain("red", size=(2048, 512)),)),
        Row("", (plain("blue", size=(16, 64)),)),
    ]
    grid = labelled_grid(rows, columns=["step 1"])
    assert grid.width < 1024


def test_grid_enlarges_a_small_image_without_blur() -> None:
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (8, 0, 16, 16))
    grid = labelled_grid([Row("a", (image,))], columns=["step 1"])
    left, top = LABEL_WIDTH_PX + MARGIN_PX, LINE_PX + 2 * MARGIN_PX
    colours = grid.crop((left, top, left + 128, top + 128)).getcolors()
    assert sorted(colours or []) == [(64 * 128, (0, 0, 255)), (64 * 128, (255, 0, 0))]

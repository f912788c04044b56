"""The image that sampling starts from: its size, its cut and its mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.sampling.start_image import StartOptions, read_start


def test_image_and_mask_are_cut_alike_at_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 120:] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "mask.png")
    start = read_start(StartOptions(tmp_path / "image.png", mask=tmp_path / "mask.png"), steps=10)
    assert start.pipeline_type == "inpaint"
    inputs = start.inputs(Size(height=50, width=50))
    assert inputs["strength"] == 0.6
    assert (inputs["image"].mode, inputs["mask_image"].mode) == ("RGB", "L")
    for image in (inputs["image"], inputs["mask_image"]):
        grey = np.asarray(image.convert("L"))
        assert image.size == (50, 50)
        assert grey[:, :6].max() < 10
        assert grey[:, 14:].min() > 245


def test_size_has_the_aspect_of_the_image_and_the_area_of_the_resolution(tmp_path: Path) -> None:
    Image.new("RGB", (300, 100)).save(tmp_path / "image.png")
    start = read_start(StartOptions(tmp_path / "image.png"), steps=10)
    assert start.size(1024, alignment=64) == Size(height=576, width=1792)
    assert start.pipeline_type == "image2image"
    assert "mask_image" not in start.inputs(Size(64, 64))

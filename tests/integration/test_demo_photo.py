"""The demo on a photograph: its last validation image is nearer to the photograph than the base model's."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from simpletuner.helpers.io.run_folder import METRICS_FILE, VALIDATION_FOLDER
from tests.integration.processes import start

logger = logging.getLogger(__name__)

CONFIG = "config/examples/demo-photo/config.json"
PHOTOGRAPH = "simpletuner/demo/photo/cat.jpg"
SIZE_PX = 64
CELLS = 8
"""Of the grid, on each side."""


def pixels(image: Image.Image) -> NDArray[np.float64]:
    """[64, 64, 3] in [0, 255], of the square in the middle, as the demo crops."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE_PX, SIZE_PX)), dtype=np.float64)


def colour_distance(image: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Euclidean distance of the mean colours."""
    return float(np.linalg.norm(image.mean((0, 1)) - other.mean((0, 1))))


def grid_distance(image: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Root mean square difference of the mean colours in the cells of a grid: colours at their places."""
    cells = [each.reshape(CELLS, SIZE_PX // CELLS, CELLS, -1, 3).mean((1, 3)) for each in (image, other)]
    return float(np.sqrt(((cells[0] - cells[1]) ** 2).mean()))


@pytest.fixture(scope="module")
def photograph(repository: Path) -> NDArray[np.float64]:
    with Image.open(repository / PHOTOGRAPH) as image:
        return pixels(image)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_last_validation_image_is_nearer_to_the_photograph_than_the_base_models(
    seed: int, tmp_path: Path, repository: Path, photograph: NDArray[np.float64]
) -> None:
    output = tmp_path / "output"
    caches = [f"cache_dir_{name}={tmp_path / 'cache' / name}" for name in ("vae", "text")]
    command = ("--config", CONFIG, f"seed={seed}", f"output_dir={output}", *caches)
    run = start(repository / "simpletuner" / "train.py", *command)
    assert run.wait(1700) == 0, run.errors()[-3000:]
    last = json.loads((output / METRICS_FILE).read_text().splitlines()[-1])["step"]
    (base,) = (output / VALIDATION_FOLDER / "base").glob("00-*.png")
    (trained,) = (output / VALIDATION_FOLDER / f"step-{last}").glob("00-*.png")
    for distance in (colour_distance, grid_distance):
        before, after = (distance(pixels(Image.open(each)), photograph) for each in (base, trained))
        logger.info("seed %d, %s: base model %.1f, demo %.1f", seed, distance.__name__, before, after)
        assert after < before / 2


def test_distances_are_zero_for_the_photograph_and_tell_colours_from_places(
    photograph: NDArray[np.float64],
) -> None:
    assert colour_distance(photograph, photograph) == grid_distance(photograph, photograph) == 0
    mirrored, grey = photograph[:, ::-1], np.full_like(photograph, 128)
    assert colour_distance(mirrored, photograph) == pytest.approx(0)
    assert grid_distance(mirrored, photograph) > 20
    assert colour_distance(grey, photograph) > 20
    brighter = photograph + 30
    assert colour_distance(brighter, photograph) == pytest.approx(30 * 3**0.5)
    assert grid_distance(brighter, photograph) == pytest.approx(30)

"""Validation images have the size of the bucket that a square image is trained in."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest
from PIL import Image

from simpletuner.helpers.configuration.loading.rules import training_size
from simpletuner.helpers.configuration.schema.datasets import ResolutionType
from simpletuner.helpers.configuration.schema.resolution import square_size
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import ModelSpec, Size
from simpletuner.helpers.data.buckets import bucket_size
from simpletuner.helpers.data.dataset import TrainingData

if TYPE_CHECKING:
    from conftest import Workspace

SPEC = ModelSpec("toy", {"small": "somebody/toy"}, "small", ("epsilon",), 64, 8, 512, ("to_q",))


@pytest.mark.parametrize("resolution_type", get_args(ResolutionType))
def test_validation_size_is_the_bucket_of_a_square_image(resolution_type: ResolutionType) -> None:
    different = []
    for edge in range(64, 2049, 8):
        resolution = edge**2 / 1_000_000 if resolution_type == "area" else float(edge)
        for alignment in range(8, 65, 8):
            data = DataConfig(
                resolution=resolution, resolution_type=resolution_type, aspect_bucket_alignment=alignment
            )
            how = {"resolution": resolution, "resolution_type": resolution_type, "alignment": alignment}
            bucket = bucket_size(Size(height=1600, width=1600), **how, aspect_decimals=2)
            sizes = [training_size(data, SPEC), bucket, square_size(**how)]
            if len(set(sizes)) > 1:
                different.append((how, *map(str, sizes)))
    assert not different


# (2m + 1/2) * alignment, where rounding a tie to even and rounding it up differ.
@pytest.mark.parametrize(("resolution", "size"), [(160, "192x192"), (800, "832x832"), (928, "960x960")])
@pytest.mark.parametrize("alignment", [None, 64])
def test_loaded_validation_size_is_the_size_that_images_are_trained_in(
    workspace: Workspace, resolution: int, size: str, alignment: int | None
) -> None:
    workspace.families = {"toy": SPEC}
    Image.new("RGB", (1600, 1600)).save(workspace.folder / "images" / "a.png")
    run = workspace.load(resolution=resolution, aspect_bucket_alignment=alignment)
    data = TrainingData(run.datasets, run.data, seed=1, batch_size=1, pixel_alignment=SPEC.pixel_alignment)
    assert [str(each.target_px) for each in data.samples] == [size]
    assert [str(each) for each in run.validation.validation_resolution] == [size]

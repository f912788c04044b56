"""References that are made of the images themselves."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.made_references import (
    Canny,
    JpegArtifacts,
    MadeReference,
    RandomMasks,
    Superresolution,
)
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.images import as_pixels
from simpletuner.helpers.data.made_references import DepthEstimator, make_reference
from simpletuner.helpers.data.pixels import load_pixels

Make = Callable[..., TrainingData]
PLAIN = {"blur_radius": 0, "add_noise": False}


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Every pixel another colour, with detail."""
    width, height = size
    values = np.arange(width * height * 3, dtype=np.int64).reshape(height, width, 3)
    return Image.fromarray((values * 2654435761 % 251).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image, dtype=np.int64)


def made(image: Image.Image, how: MadeReference, seed: int = 1) -> np.ndarray:
    found = make_reference(image, how, seed=seed)
    assert found.size == image.size
    return values(found)


@pytest.mark.parametrize(
    "how",
    [
        Canny(type="canny"),
        Superresolution(type="superresolution"),
        JpegArtifacts(type="jpeg_artifacts", quality_mode="range"),
        JpegArtifacts(type="jpeg_artifacts", quality_mode="random"),
        RandomMasks(type="random_masks"),
        RandomMasks(type="random_masks", output_mode="masked_image"),
    ],
    ids=range(6),
)
def test_a_reference_depends_on_the_image_and_the_seed_alone(how: MadeReference) -> None:
    first = made(photo(), how)
    assert np.array_equal(first, made(photo(), how))
    assert (first != values(photo())).any()
    others = [made(photo(), how, seed) for seed in range(2, 8)]
    assert any((first != other).any() for other in others) is how.is_random


def test_canny_draws_the_border_of_a_square_one_pixel_wide() -> None:
    image = Image.new("RGB", (40, 40))
    image.paste((200, 200, 200), (10, 12, 30, 28))
    edges = made(image, Canny(type="canny"))
    assert set(np.unique(edges)) == {0, 255}
    assert np.all((edges[15:25, :, 0] > 0).sum(axis=1) == 2)
    assert np.all((edges[:, 14:26, 0] > 0).sum(axis=0) == 2)
    # As OpenCV draws it.
    assert np.flatnonzero(edges.any(axis=(1, 2)))[[0, -1]].tolist() == [11, 27]
    assert np.flatnonzero(edges.any(axis=(0, 2)))[[0, -1]].tolist() == [9, 29]
    assert (edges[..., 0] > 0).sum() == 68


def test_canny_keeps_a_faint_edge_only_where_it_joins_a_strong_one() -> None:
    """Steps of 20, of which the upper half of the left one is 120 high; gradients are 4 times a step."""
    image = Image.new("RGB", (60, 60))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 0, 60, 60), fill=(20, 20, 20))
    draw.rectangle((20, 0, 39, 29), fill=(120, 120, 120))
    draw.rectangle((40, 0, 60, 60), fill=(40, 40, 40))
    joined = made(image, Canny(type="canny", low_threshold=50, high_threshold=200))[..., 0] > 0
    assert joined[50, 18:22].any()  # below the strong part
    alone = Image.new("RGB", (60, 60))
    alone.paste((20, 20, 20), (20, 0, 60, 60))
    assert not made(alone, Canny(type="canny", low_threshold=50, high_threshold=200)).any()
    assert made(alone, Canny(type="canny", low_threshold=50, high_threshold=70)).any()
    assert not made(alone, Canny(type="canny", low_threshold=90, high_threshold=90)).any()


@pytest.mark.parametrize("slope", [(1, 0), (0, 1), (1, 1), (1, -1)])
def test_canny_thins_edges_of_every_direction(slope: tuple[int, int]) -> None:
    across, down = np.meshgrid(np.arange(41) - 20.0, np.arange(41) - 20.0)
    height = 1 / (1 + np.exp(-(across * slope[0] + down * slope[1]) / 2))
    image = Image.fromarray((height * 255).astype(np.uint8)).convert("RGB")
    edges = made(image, Canny(type="canny"))[8:-8, 8:-8, 0] > 0
    line = edges.sum(axis=0 if slope == (0, 1) else 1)
    assert set(line) <= {1, 2}


def test_superresolution_takes_its_steps() -> None:
    image = photo()

    def degraded(**changes: object) -> np.ndarray:
        return made(image, Superresolution(type="superresolution", **PLAIN | changes))

    assert np.array_equal(degraded(), values(image))
    assert np.array_equal(degraded(blur_radius=1.5), values(image.filter(ImageFilter.GaussianBlur(1.5))))
    box = image.filter(ImageFilter.BoxBlur(2))
    assert np.array_equal(degraded(blur_radius=2, blur_type="box"), values(box))
    both = image.filter(ImageFilter.BoxBlur(1.4)).filter(ImageFilter.GaussianBlur(1.4))
    assert np.array_equal(degraded(blur_radius=2, blur_type="both"), values(both))
    small = image.resize((16, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(
        degraded(downscale_factor=4), values(small.resize(image.size, Image.Resampling.BILINEAR))
    )
    assert np.array_equal(degraded(jpeg_quality=30), values(stored(image, 30)))


def test_noise_of_superresolution_has_its_level() -> None:
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    how = Superresolution(type="superresolution", blur_radius=0, noise_level=0.1)
    noise = made(grey, how) - 128
    assert abs(noise.mean()) < 0.5
    assert noise.std() == pytest.approx(25.5, rel=0.03)


def stored(image: Image.Image, *qualities: int) -> Image.Image:
    for quality in qualities:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        image = Image.open(buffer).convert("RGB")
    return image


@pytest.mark.parametrize(
    ("changes", "qualities"),
    [
        ({}, [25]),
        ({"quality": 40, "compression_rounds": 3, "round_quality_decay": 0.5}, [40, 20, 10]),
        ({"quality_mode": "range", "quality_range": (33, 33)}, [33]),
        ({"quality_mode": "random", "quality_list": (44,)}, [44]),
    ],
    ids=range(4),
)
def test_jpeg_artifacts_are_those_of_the_qualities(
    changes: dict[str, object], qualities: Sequence[int]
) -> None:
    found = made(photo(), JpegArtifacts(type="jpeg_artifacts", **changes))
    assert np.array_equal(found, values(stored(photo(), *qualities)))


def test_a_drawn_quality_lies_in_its_range() -> None:
    how = JpegArtifacts(type="jpeg_artifacts", quality_mode="range", quality_range=(10, 12))
    allowed = [values(stored(photo(), quality)).tobytes() for quality in (10, 11, 12)]
    drawn = {made(photo(), how, seed).tobytes() for seed in range(30)}
    assert drawn == set(allowed)


@pytest.mark.parametrize("shape", ["rectangle", "circle", "brush", "irregular"])
def test_random_masks_cover_their_part(shape: str) -> None:
    how = RandomMasks(type="random_masks", mask_types=(shape,), min_coverage=0.2, max_coverage=0.4)
    parts = [(made(photo((96, 64)), how, seed) > 0).mean() for seed in range(12)]
    assert min(parts) >= 0.2
    assert max(parts) <= 0.4
    assert max(parts) - min(parts) > 0.05


def test_a_masked_image_is_white_where_the_mask_is() -> None:
    how = RandomMasks(type="random_masks")
    mask = made(photo(), how) > 0
    assert set(np.unique(made(photo(), how))) == {0, 255}
    masked = made(photo(), how.model_copy(update={"output_mode": "masked_image"}))
    assert np.array_equal(masked, np.where(mask, 255, values(photo())))
    inverted = made(photo(), how.model_copy(update={"invert_mask": True}))
    assert np.array_equal(inverted > 0, ~mask)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "photos").mkdir()
    for name, size in (("a", (96, 64)), ("b", (96, 64)), ("c", (64, 64))):
        photo(size).save(tmp_path / "photos" / f"{name}.png")

    def made_data(
        *conditioning: object, seed: int = 42, depth: DepthEstimator | None = None, **options: object
    ) -> TrainingData:
        config = DatasetConfig(
            id="photos",
            instance_data_dir=tmp_path / "photos",
            conditioning=list(conditioning),
            **{"resolution": 48, "crop": True, "crop_style": "random", **options},
        )
        folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
        data = TrainingData([config], folders, seed=seed, batch_size=1, pixel_alignment=16, depth=depth)
        data.set_encoders(vae_identity="vae", text_identity="text")
        return data

    return made_data


def keys(data: TrainingData) -> dict[str, list[str]]:
    """The cache keys of the references of each image."""
    return {
        image.sample.path: [data._cached.latents_key(each) for each in image.references]
        for image in data.divided.trained[0].images
    }


def test_a_reference_is_made_of_the_cut_of_its_image(make: Make, tmp_path: Path) -> None:
    data = make({"type": "canny"}, {"type": "inpainting", "output_mode": "masked_image"})
    for image in data.divided.trained[0].images:
        edges, masked = image.references
        file = Image.open(tmp_path / "photos" / image.sample.path)
        resized = image.sample.resized_px
        top, left = image.sample.crop_top_left
        size = image.sample.target_px
        cut = file.resize((resized.width, resized.height), Image.Resampling.LANCZOS)
        cut = cut.crop((left, top, left + size.width, top + size.height))
        expected = make_reference(cut, Canny(type="canny"), seed=0)
        assert np.array_equal(load_pixels(edges), as_pixels(expected))
        shown, own = load_pixels(masked), load_pixels(image)
        assert ((shown == own) | (shown == 1)).all()
        assert (shown != own).any()


def test_images_of_the_same_bytes_are_drawn_apart(make: Make) -> None:
    data = make({"type": "random_masks"}, crop=False)
    first, second, _ = (load_pixels(image.references[0]) for image in data.divided.trained[0].images)
    assert (first != second).any()


def test_a_made_reference_is_cached_by_what_it_depends_on(make: Make) -> None:
    still, drawn = {"type": "canny"}, {"type": "random_masks"}
    options = {"crop_style": "center"}
    before = keys(make(still, drawn, **options))
    assert before == keys(make(still, drawn, **options))
    assert all(len({*each}) == 2 for each in before.values())
    other_seed = keys(make(still, drawn, seed=7, **options))
    for name, (edges, masks) in before.items():
        assert other_seed[name][0] == edges
        assert other_seed[name][1] != masks
    changed = keys(make(still | {"low_threshold": 60}, drawn | {"captions": "fill"}, **options))
    for name, (edges, masks) in before.items():
        assert changed[name][0] != edges
        assert changed[name][1] == masks
    cropped = keys(make(still, drawn, crop_style="corner"))
    assert cropped["a.png"][0] != before["a.png"][0]


def test_facts_tell_how_references_are_made(make: Make) -> None:
    key = "dataset photos, hash of all references"
    facts = make({"type": "canny"}).facts()[key]
    assert facts == make({"type": "edges"}).facts()[key]
    assert facts != make({"type": "canny", "low_threshold": 1}).facts()[key]
    assert key not in make().facts()


def test_a_damaged_image_has_its_own_reason(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "photos" / "a.png"
    file.write_bytes(file.read_bytes()[:-40])
    data = make({"type": "canny"})
    for request in reversed(data.latents_requests()):
        request.load()
    (reason,) = data.damaged.values()
    assert "reference" not in reason


def test_made_references_share_the_bucket_of_their_images(make: Make) -> None:
    data = make({"type": "canny"}, crop=False)
    assert sorted(name for name, _ in data._buckets) == ["photos 48x48", "photos 64x32"]


class Estimator:
    """Stands for models: inverts the image; its identity is the content of the folder."""

    def identity(self, folder: Path) -> str:
        return (folder / "weights").read_text()

    def estimate(self, image: Image.Image, folder: Path) -> Image.Image:
        return image.point(lambda value: 255 - value)

    def unload(self) -> None:
        pass


def test_depth_is_estimated_from_the_cut_and_cached_by_the_model(make: Make, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        (folder / "weights").write_text("first")

    def data(folder: Path) -> TrainingData:
        return make({"type": "depth", "model": str(folder)}, depth=Estimator())

    before = keys(data(folders[0]))
    assert keys(data(folders[1])) == before  # what counts is the content
    facts = data(folders[0]).facts()
    assert facts == data(folders[1]).facts()
    (folders[0] / "weights").write_text("second")
    assert not {*map(tuple, keys(data(folders[0])).values())} & {*map(tuple, before.values())}
    found = data(folders[0])
    assert facts != found.facts()
    image = found.divided.trained[0].images[0]
    request = next(each for each in found.latents_requests() if each.key == keys(found)["a.png"][0])
    assert torch.allclose(request.load(), -load_pixels(image), atol=1e-6)

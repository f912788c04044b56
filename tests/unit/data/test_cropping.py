"""The bucket and the crop of an image, by the settings of its dataset."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.buckets import Placement
from simpletuner.helpers.data.cropping import Cropping


def cropping(*, seed: int = 1, alignment: int = 64, **keys: object) -> Cropping:
    defaults = {"crop": True, "crop_style": "center", "resolution_type": "pixel", "resolution": 512}
    config = DatasetConfig(id="x", instance_data_dir=Path.cwd(), **{**defaults, **keys})
    return Cropping(config=config, seed=seed, alignment=alignment, aspect_decimals=2)


def placed(image_px: Size, *, name: str = "a.png", **keys: object) -> Placement:
    found = cropping(**keys).placement(image_px, name=name)
    assert isinstance(found, Placement), found
    return found


AREA = {
    "resolution_type": "pixel_area",
    "resolution": 1024,
    "maximum_image_size": 1536,
    "target_downsample_size": 1280,
}
EDGE = {"maximum_image_size": 1024, "target_downsample_size": 768}
MEGAPIXELS = {
    "resolution_type": "area",
    "resolution": 0.25,
    "maximum_image_size": 1.0,
    "target_downsample_size": 0.5,
}


@pytest.mark.parametrize(
    ("image_px", "keys", "resized_px", "top_left"),
    [
        # 4000^2 is above 1536^2; 1280 / 4000 brings it to 1280^2, and (1280 - 1024) / 2 = 128.
        (Size(4000, 4000), AREA, Size(1280, 1280), (128, 128)),
        # sqrt(1280^2 / 6e6) = 0.52255: 1567.7 x 1045.1, of which 544 x 21 are cut off.
        (Size(2000, 3000), AREA, Size(1045, 1568), (10, 272)),
        # sqrt(1280^2 / 2^23) = 0.442 would be 1810 x 905, lower than the crop: 0.5 as without the keys.
        (Size(2048, 4096), AREA, Size(1024, 2048), (0, 512)),
        # At the threshold, not above it.
        (Size(1536, 1536), AREA, Size(1024, 1024), (0, 0)),
        (Size(1537, 1536), AREA, Size(1280, 1280), (128, 128)),
        # The shorter edge counts: 1100 is above 1024, and 768 / 1100 * 2000 = 1396.4.
        (Size(1100, 2000), EDGE, Size(768, 1396), (128, 442)),
        (Size(1024, 2000), EDGE, Size(512, 1000), (0, 244)),
        # 2.56 megapixels: sqrt(0.5 / 2.56) * 1600 = 707.1; the square of 0.25 megapixels is 500 -> 512.
        (Size(1600, 1600), MEGAPIXELS, Size(707, 707), (97, 97)),
        (Size(1000, 1000), MEGAPIXELS, Size(512, 512), (0, 0)),
        # It never enlarges: 1100 is above 1024 and below 1200.
        (Size(1100, 1100), EDGE | {"target_downsample_size": 1200}, Size(512, 512), (0, 0)),
        # No effect: the target is the resolution, there is no crop, or one key is missing.
        (Size(2000, 3000), AREA | {"target_downsample_size": 1024}, Size(1024, 1536), (0, 256)),
        (Size(2000, 3000), AREA | {"crop": False}, Size(853, 1280), (10, 0)),
        (Size(2000, 3000), AREA | {"maximum_image_size": None}, Size(1024, 1536), (0, 256)),
        (Size(2000, 3000), AREA | {"target_downsample_size": None}, Size(1024, 1536), (0, 256)),
        # With the bucket of the image's aspect, 832x1280, the image has the aspect of the crop and is larger.
        (Size(2000, 3000), AREA | {"crop_aspect": "preserve"}, Size(1045, 1568), (106, 144)),
    ],
)
def test_an_image_above_the_maximum_is_resized_to_the_target_before_its_crop(
    image_px: Size, keys: dict[str, object], resized_px: Size, top_left: tuple[int, int]
) -> None:
    found = placed(image_px, **keys)
    assert (found.resized_px, found.top_left) == (resized_px, top_left)


def test_only_images_above_the_maximum_count_as_downsampled() -> None:
    sizes = (Size(4000, 4000), Size(1536, 1536), Size(100, 100))
    assert [cropping(**AREA).is_downsampled(size) for size in sizes] == [True, False, False]
    assert not cropping(**AREA | {"crop": False}).is_downsampled(Size(4000, 4000))


@pytest.mark.parametrize(
    ("image_px", "target_px"),
    [
        (Size(200, 300), Size(512, 768)),
        # 1.2 is 0.2 from 1.0 and 0.3 from 1.5; 0.7 is 0.2 from 0.5 and 0.3 from 1.0.
        (Size(500, 600), Size(512, 512)),
        (Size(1000, 700), Size(1024, 512)),
        (Size(100, 900), Size(512, 1024)),
    ],
)
def test_closest_takes_the_bucket_of_the_nearest_aspect(image_px: Size, target_px: Size) -> None:
    for buckets in ([2.0, 0.5, 1.0, 1.5], [{"aspect": a, "weight": 0.25} for a in (0.5, 1.0, 1.5, 2.0)]):
        assert placed(image_px, crop_aspect="closest", crop_aspect_buckets=buckets).target_px == target_px


@pytest.mark.parametrize(
    ("aspect", "resolution_type", "resolution", "alignment", "target_px"),
    [
        # sqrt(1024^2 * 0.75) = 886.8 -> 896 wide, sqrt(1024^2 / 0.75) = 1182.4 -> 1152 high.
        (0.75, "pixel_area", 1024, 64, Size(1152, 896)),
        (4 / 3, "pixel_area", 1024, 64, Size(896, 1152)),
        (1.0, "pixel_area", 800, 64, Size(832, 832)),
        # The area is 64^2: 45.3 -> 48 wide, 90.5 -> 88 high.
        (0.5, "pixel_area", 64, 8, Size(88, 48)),
        # Decimals of the aspect are kept: 512 * 1.126 = 576.5 -> 576.
        (1.126, "pixel", 512, 8, Size(512, 576)),
    ],
)
def test_a_bucket_has_its_aspect_at_the_resolution(
    aspect: float, resolution_type: str, resolution: float, alignment: int, target_px: Size
) -> None:
    found = placed(
        Size(3000, 3000),
        crop_aspect="random",
        crop_aspect_buckets=[aspect],
        resolution_type=resolution_type,
        resolution=resolution,
        alignment=alignment,
    )
    assert found.target_px == target_px


WIDE, SQUARE, TALL = Size(512, 1024), Size(512, 512), Size(1024, 512)
IMAGE_PX = Size(900, 900)


def shapes(number: int = 2000, *, image_px: Size = IMAGE_PX, **keys: object) -> Counter[Size]:
    made = cropping(crop_aspect="random", **keys)
    found = [made.placement(image_px, name=f"{index}.png") for index in range(number)]
    return Counter(each.target_px for each in found if isinstance(each, Placement))


def test_random_draws_numbers_evenly_and_objects_by_weight() -> None:
    even = shapes(crop_aspect_buckets=[0.5, 1.0, 2.0])
    assert even.keys() == {TALL, SQUARE, WIDE}
    assert all(abs(number - 2000 / 3) < 100 for number in even.values()), even  # 4.7 standard deviations
    weights = {0.5: 0.7, 1.0: 0.3, 2.0: 0.0}
    weighted = shapes(
        crop_aspect_buckets=[{"aspect": aspect, "weight": weight} for aspect, weight in weights.items()]
    )
    assert weighted.keys() == {TALL, SQUARE}
    assert abs(weighted[TALL] - 1400) < 100, weighted


def test_random_draws_among_the_buckets_that_the_threshold_leaves() -> None:
    # 900 px: the square needs no enlargement, 1024 px one of 0.138.
    buckets = [0.5, 1.0, 2.0]
    left = {
        threshold: set(shapes(50, crop_aspect_buckets=buckets, max_upscale_threshold=threshold))
        for threshold in (0, 0.13, 0.14, None)
    }
    assert left == {0: {SQUARE}, 0.13: {SQUARE}, 0.14: {TALL, SQUARE, WIDE}, None: {TALL, SQUARE, WIDE}}
    # A landscape has the height of no portrait.
    wide = shapes(50, image_px=Size(512, 1024), crop_aspect_buckets=[0.5, 2.0], max_upscale_threshold=0)
    assert wide.keys() == {WIDE}


def test_the_weights_of_the_buckets_that_the_threshold_leaves_keep_their_ratio() -> None:
    buckets = [
        {"aspect": 2.0, "weight": 0.6},
        {"aspect": 1.0, "weight": 0.1},
        {"aspect": 1.25, "weight": 0.3},
    ]
    found = shapes(crop_aspect_buckets=buckets, max_upscale_threshold=0)
    assert found.keys() == {SQUARE, Size(512, 640)}
    assert abs(found[SQUARE] - 500) < 100, found


def test_the_threshold_is_exact_at_its_own_enlargement() -> None:
    # 640 px are a fifth more than 533.33: 534 px may be enlarged by 0.2, 533 px not.
    keys = {"crop_aspect": "closest", "crop_aspect_buckets": [1.0], "resolution": 640}
    made = cropping(**keys, max_upscale_threshold=0.2)
    assert isinstance(made.placement(Size(534, 534), name="a"), Placement)
    assert isinstance(made.placement(Size(533, 533), name="a"), str)
    # 1088 / 800 is 1.36 and a rounding error more.
    exact = cropping(**keys | {"resolution": 1088}, max_upscale_threshold=0.36)
    assert isinstance(exact.placement(Size(800, 800), name="a"), Placement)


def test_closest_takes_the_nearest_bucket_that_the_threshold_leaves() -> None:
    keys = {"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 2.0]}
    assert placed(Size(512, 1000), **keys).target_px == WIDE
    assert placed(Size(512, 1000), **keys, max_upscale_threshold=0).target_px == SQUARE


def test_an_image_without_a_bucket_is_refused_with_the_key_and_its_value() -> None:
    reason = cropping(
        crop_aspect="random", crop_aspect_buckets=[1.0, 2.0], max_upscale_threshold=0.2
    ).placement(Size(256, 256), name="a")
    assert isinstance(reason, str)
    assert "max_upscale_threshold 0.2" in reason
    assert "256x256" in reason


def test_the_threshold_is_for_chosen_buckets_alone() -> None:
    for keys in ({}, {"crop_aspect": "preserve"}, {"crop": False}):
        assert placed(Size(100, 100), **keys, max_upscale_threshold=0).target_px == SQUARE


def test_a_random_shape_depends_on_the_seed_and_the_name() -> None:
    def drawn(seed: int, names: str) -> list[Size]:
        keys = {"crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0], "seed": seed}
        return [placed(IMAGE_PX, name=name, **keys).target_px for name in names]

    assert drawn(1, "abcdefghijkl") == drawn(1, "lkjihgfedcba")[::-1]
    assert drawn(1, "abcdefghijkl") != drawn(2, "abcdefghijkl")
    assert len(set(drawn(1, "abcdefghijkl"))) == 3


@pytest.mark.parametrize(
    ("keys", "target_px", "top_left"),
    [
        ({}, SQUARE, (0, 63)),
        ({"crop_aspect": "preserve", "alignment": 256}, Size(512, 1280), (23, 0)),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1.0]}, SQUARE, (0, 63)),
    ],
)
def test_a_random_position_stays_where_it_was(
    keys: dict[str, object], target_px: Size, top_left: tuple[int, int]
) -> None:
    # Random("1 crop x 'a.png'").randint: other positions would leave the cached latents of users unused.
    found = placed(Size(800, 1800), crop_style="random", **keys)
    assert (found.target_px, found.top_left) == (target_px, top_left)

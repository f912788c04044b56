"""Masks: found beside their images, cut like them, cached, and in batches as factors of the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.caching.filling import encode_missing
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.masks import mask_entries
from simpletuner.helpers.caching.shards import read_index
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig, MaskConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Batch, Sample, Size, TextEmbeds
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.masks import BLANK, is_blank, loss_factors, read_mask
from simpletuner.helpers.data.pairing import has_aspect
from simpletuner.helpers.data.preview import preview
from simpletuner.helpers.errors import DataError
from tests.unit.data.image_samples import encoded

Pixels = np.ndarray
Make = Callable[..., TrainingData]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def sample(original: Size, resized: Size | None = None, *, at: tuple[int, int] = (0, 0), px: Size) -> Sample:
    return Sample("photos", "a.png", "", original, resized or original, at, px)


def halves(width: int = 64, height: int = 64, *, split: int | None = None) -> Image.Image:
    """White left of `split`, by default the middle, and black right of it."""
    image = Image.new("RGB", (width, height), BLACK)
    image.paste(WHITE, (0, 0, width // 2 if split is None else split, height))
    return image


def paint(folder: Path, name: str, image: Image.Image) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four images of 64x64, the first in a subfolder, and masks that are white on the left."""
    for number, name in enumerate(("in/0", "1", "2", "3")):
        paint(tmp_path / "photos", f"{name}.png", Image.new("RGB", (64, 64), (40 * number, 7, 9)))
        paint(tmp_path / "masks", f"{name}.png", halves())
    return tmp_path / "photos", tmp_path / "masks"


@pytest.fixture
def make(folders: tuple[Path, Path], tmp_path: Path) -> Make:
    def made(
        kind: str = "mask", *, masks: dict[str, object] | None = None, **options: object
    ) -> TrainingData:
        images, mask_folder = folders
        own = {key: options.pop(key) for key in ("seed", "num_processes", "process_index") if key in options}
        values = {"resolution": 64, "conditioning_data": ["masks"], **options}
        return TrainingData(
            [DatasetConfig(id="photos", instance_data_dir=images, **values)],
            DataConfig(cache_dir_vae=tmp_path / "cache" / "vae", cache_dir_text=tmp_path / "cache" / "text"),
            conditioning=[
                ConditioningConfig(id="masks", instance_data_dir=mask_folder, conditioning_type=kind)
            ],
            masks=MaskConfig(**(masks or {})),
            **{"seed": 42, "batch_size": 2, "pixel_alignment": 16, **own},
        )

    return made


def cached(data: TrainingData, *, cell: int = 8) -> TrainingData:
    """The data with full caches, its latents the means of cells of so many pixels."""
    data.set_encoders(vae_identity=f"vae {cell}", text_identity="clip")
    pooled = lambda pixels: latents_entries(torch.nn.functional.avg_pool2d(torch.stack(pixels), cell))  # noqa: E731
    embeds = TextEmbeds(prompt_embeds=torch.zeros(1, 4, 2))
    list(encode_missing(data.latents_requests(), pooled, batch_size=1))
    list(encode_missing(data.mask_requests(), mask_entries, batch_size=1))
    list(
        encode_missing(data.text_requests(), lambda texts: [text_entry(embeds) for _ in texts], batch_size=1)
    )
    data.leave_out(data.damaged)
    return data


def batch(data: TrainingData, index: int = 0) -> Batch:
    return data._batch(index)


def test_a_mask_is_a_factor_of_each_element_of_the_latents(make: Make) -> None:
    found = batch(cached(make()))
    assert found.loss_mask is not None
    assert found.loss_mask.shape == (2, 1, 8, 8)
    assert found.loss_mask.dtype == torch.float32
    assert (found.loss_mask[..., :4] == 1).all()
    assert (found.loss_mask[..., 4:] == 0).all()
    assert found.to(torch.device("meta")).loss_mask.device.type == "meta"


def test_images_without_masks_have_none(make: Make) -> None:
    data = cached(make(conditioning_data=[]))
    assert batch(data).loss_mask is None
    assert data.mask_requests() == []
    assert not [key for key in data.facts() if "masks" in key]


def test_a_coarser_grid_of_latents_takes_the_means_of_cells(make: Make, folders: tuple[Path, Path]) -> None:
    for name in ("in/0", "1", "2", "3"):
        paint(folders[1], f"{name}.png", halves(split=24))
    found = batch(cached(make(), cell=16)).loss_mask
    assert found.shape == (2, 1, 4, 4)
    assert found[0, 0, 0].tolist() == [1, 0.5, 0, 0]


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (192, 192)])
def test_a_mask_of_another_size_covers_the_same_part(size: tuple[int, int]) -> None:
    target = sample(Size(128, 128), Size(96, 96), at=(16, 8), px=Size(64, 80))
    mask = read_mask(encoded(halves(*size), "PNG"), target, kind="mask")
    # The middle, 48 px from the left of the resized image, is 40 px from the left of the crop: 5 cells.
    assert mask.shape == (1, 8, 10)
    assert (mask[..., :5] == 1).all()
    assert (mask[..., 5:] == 0).all()


def test_a_crop_takes_the_rows_of_its_place() -> None:
    image = Image.new("RGB", (64, 64), BLACK)
    image.paste(WHITE, (0, 32, 64, 40))
    mask = read_mask(encoded(image, "PNG"), sample(Size(64, 64), at=(24, 0), px=Size(32, 32)), kind="mask")
    assert mask[0, :, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("colour", "kind", "value"),
    [
        ((51, 255, 255), "mask", 0.2),
        ((255, 0, 0), "mask", 1.0),
        ((255, 129, 0), "segmentation", 128 / 255),
        ((10, 20, 30), "alpha", 1.0),
        ((10, 20, 30, 102), "alpha", 0.4),
        ((255, 255, 255, 0), "mask", 1.0),  # the channel itself: nothing is mixed with alpha
        ((0, 0, 0, 0), "mask", 0.0),
    ],
)
def test_channels_of_a_mask(colour: tuple[int, ...], kind: str, value: float) -> None:
    image = Image.new("RGBA" if len(colour) == 4 else "RGB", (16, 16), colour)
    mask = read_mask(encoded(image, "PNG"), sample(Size(16, 16), px=Size(16, 16)), kind=kind)
    assert mask.dtype == torch.float16
    torch.testing.assert_close(mask.float(), torch.full((1, 2, 2), value), rtol=1e-3, atol=0)


def test_grey_of_16_bits_keeps_its_share() -> None:
    image = Image.fromarray(np.full((16, 16), 51 * 257, dtype=np.uint16))
    mask = read_mask(encoded(image, "PNG"), sample(Size(16, 16), px=Size(16, 16)), kind="mask")
    torch.testing.assert_close(mask.float(), torch.full((1, 2, 2), 0.2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_a_mask_of_any_mode_is_black_and_white(mode: str) -> None:
    grey = halves().convert("L")
    image = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    )
    mask = read_mask(encoded(image, "PNG"), sample(Size(64, 64), px=Size(64, 64)), kind="mask")
    assert mask[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "config", "factors"),
    [
        ("mask", {}, [1.0, 0.5, 0.25, 0.0]),
        ("alpha", {}, [1.0, 0.5, 0.25, 0.0]),
        ("segmentation", {}, [1.0, 0.0, 0.0, 0.0]),
        ("mask", {"unmasked_weight": 0.3}, [1.0, 0.5, 0.3, 0.3]),
        ("segmentation", {"unmasked_weight": 0.3}, [1.0, 0.3, 0.3, 0.3]),
        ("mask", {"normalize_masked_area_loss": True}, [16 / 7, 8 / 7, 4 / 7, 0.0]),
        # The mean of 1, 0.5, 0.25 and 0.25 is 0.5.
        ("mask", {"normalize_masked_area_loss": True, "unmasked_weight": 0.25}, [2.0, 1.0, 0.5, 0.5]),
    ],
    ids=range(7),
)
def test_factors_match_hand_computed_values(
    kind: str, config: dict[str, object], factors: list[float]
) -> None:
    mask = torch.tensor([[[1.0, 0.5], [0.25, 0.0]]], dtype=torch.float16)
    found = loss_factors(mask, kind, grid=(2, 2), config=MaskConfig(**config))
    torch.testing.assert_close(found, torch.tensor(factors).view(1, 2, 2))


def test_a_blank_mask_is_never_divided_by_zero() -> None:
    config = MaskConfig(normalize_masked_area_loss=True)
    assert loss_factors(torch.zeros(1, 2, 2), "mask", grid=(2, 2), config=config).tolist() == [
        [[0, 0], [0, 0]]
    ]


def test_blank_masks() -> None:
    dark = torch.full((1, 2, 2), 0.5)
    assert is_blank(torch.zeros(1, 2, 2), "mask", MaskConfig())
    assert not is_blank(dark, "mask", MaskConfig())
    assert is_blank(dark, "segmentation", MaskConfig())
    assert not is_blank(dark + 0.1, "segmentation", MaskConfig())
    assert not is_blank(torch.zeros(1, 2, 2), "mask", MaskConfig(unmasked_weight=0.1))


@pytest.mark.parametrize(
    ("mask", "image", "same"),
    [
        (Size(64, 64), Size(64, 64), True),
        (Size(500, 333), Size(1000, 667), True),
        (Size(1000, 667), Size(500, 333), True),
        (Size(64, 63), Size(64, 64), False),
        (Size(64, 32), Size(32, 64), False),
        (Size(512, 512), Size(768, 512), False),
    ],
    ids=range(6),
)
def test_a_mask_has_the_aspect_of_its_image_but_for_rounding(mask: Size, image: Size, same: bool) -> None:
    assert has_aspect(mask, image) is same


def test_missing_and_ambiguous_masks_and_those_of_another_aspect_are_named_at_once(
    make: Make, folders: tuple[Path, Path]
) -> None:
    _, masks = folders
    (masks / "in" / "0.png").unlink()
    paint(masks, "1.bmp", halves())
    paint(masks, "2.png", halves(64, 32))
    with pytest.raises(DataError) as caught:
        make()
    for part in ("in/0.png", "1.png (1.bmp, 1.png)", "2.png (64x64, its mask 64x32)"):
        assert part in str(caught.value)
    assert "3.png" not in str(caught.value)


def test_two_images_of_one_name_do_not_share_a_mask(make: Make, folders: tuple[Path, Path]) -> None:
    paint(folders[0], "1.webp", Image.new("RGB", (64, 64)))
    with pytest.raises(DataError, match=r"1 image has the mask of another image .*: 1.png and 1.webp"):
        make()
    assert len(make(conditioning_data=[]).samples) == 5


def test_validate_names_the_same_masks(make: Make, folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = folders
    (masks / "1.png").unlink()
    config = DatasetConfig(id="photos", instance_data_dir=images, resolution=64, conditioning_data=["masks"])
    entry = ConditioningConfig(id="masks", instance_data_dir=masks, conditioning_type="mask")
    data = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
    seen = preview(config, data, alignment=16, seed=1, reads_all=True, conditioning=[entry])
    assert seen.conditioning_problem is not None
    assert "1.png" in seen.conditioning_problem
    with pytest.raises(DataError) as caught:
        make()
    assert str(caught.value) == seen.conditioning_problem
    paint(masks, "1.png", halves())
    assert (
        preview(config, data, alignment=16, seed=1, reads_all=True, conditioning=[entry]).conditioning_problem
        is None
    )


def test_only_the_images_that_are_used_need_a_mask(make: Make, folders: tuple[Path, Path]) -> None:
    images, _ = folders
    (images / "broken.png").write_bytes(b"no image")
    paint(images, "small.png", Image.new("RGB", (16, 16)))
    assert len(make(minimum_image_size=32).samples) == 4


def test_the_headers_of_masks_are_remembered(make: Make) -> None:
    data = make()
    (store,) = {each.store for each in data.mask_requests()}
    names = {each.name for each in store.folder.glob("images_*")}
    assert names == {"images_photos.safetensors", "images_masks.safetensors"}


def test_the_suffix_of_a_mask_is_free(make: Make, folders: tuple[Path, Path]) -> None:
    _, masks = folders
    (masks / "1.png").unlink()
    paint(masks, "1.bmp", halves())
    assert len(make().samples) == 4


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_an_image_whose_mask_is_black_is_skipped_and_listed(
    make: Make, folders: tuple[Path, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    paint(folders[1], "2.png", Image.new("RGB", (64, 64), BLACK))
    with caplog.at_level(logging.WARNING):
        data = cached(make(kind))
    assert [each.path for each in data.samples] == ["1.png", "3.png", "in/0.png"]
    assert [(each.path, each.reason) for each in data.skipped] == [("2.png", BLANK)]
    assert [record.message for record in caplog.records if BLANK in record.message]
    # The next run knows it from the start, and the facts of a checkpoint do not change.
    again = make(kind)
    assert again.samples == data.samples
    assert again.facts() == data.facts()
    assert [(each.path, each.reason) for each in again.skipped] == [("2.png", BLANK)]
    # A least weight keeps it, and so does a mask that is repaired.
    assert len(cached(make(kind, masks={"unmasked_weight": 0.1})).samples) == 4
    paint(folders[1], "2.png", halves())
    assert len(cached(make(kind)).samples) == 4


def test_a_mask_that_is_black_in_the_crop_counts_as_black(make: Make, folders: tuple[Path, Path]) -> None:
    images, masks = folders
    paint(images, "wide.png", Image.new("RGB", (128, 64), (9, 9, 9)))
    paint(masks, "wide.png", halves(128, 64, split=32))
    assert "wide.png" in [each.path for each in cached(make(crop=True, crop_style="corner")).samples]
    data = cached(make(crop=True, crop_style="center"))
    assert [each.path for each in data.skipped] == ["wide.png"]


def test_a_damaged_mask_skips_its_image_now_and_later(make: Make, folders: tuple[Path, Path]) -> None:
    whole = (folders[1] / "2.png").read_bytes()
    (folders[1] / "2.png").write_bytes(whole[: len(whole) - 30])
    data = make()
    requests = {each.name: each for each in data.mask_requests()}
    cached(data)
    assert requests["Mask of 1.png"].key in requests["Mask of 1.png"].store
    assert requests["Mask of 2.png"].key not in requests["Mask of 2.png"].store
    assert [each.path for each in data.skipped] == ["2.png"]
    assert "2.png" in data.skipped[0].reason
    again = make()
    assert again.samples == data.samples
    assert again.skipped == data.skipped
    (folders[1] / "2.png").write_bytes(whole)
    assert len(cached(make()).samples) == 4


def test_a_changed_mask_is_read_again_and_its_image_is_not(make: Make, folders: tuple[Path, Path]) -> None:
    before = cached(make())
    paint(folders[1], "2.png", halves(split=16))
    after = make()
    after.set_encoders(vae_identity="vae 8", text_identity="clip")
    missing = [each.name for each in after.mask_requests() if each.key not in each.store]
    assert missing == ["Mask of 2.png"]
    assert all(each.key in each.store for each in after.latents_requests())
    assert [key for key, value in after.facts().items() if before.facts()[key] != value] == [
        "dataset photos, hash of all masks"
    ]


def test_another_crop_is_another_entry(make: Make, folders: tuple[Path, Path]) -> None:
    images, masks = folders
    paint(images, "wide.png", Image.new("RGB", (128, 64), (9, 9, 9)))
    paint(masks, "wide.png", halves(128, 64))
    keys = [
        {each.key for each in make(kind, crop=True, crop_style=style).mask_requests()}
        for kind, style in (("mask", "corner"), ("mask", "center"), ("segmentation", "center"))
    ]
    assert [len(each) for each in keys] == [2, 2, 2]  # four equal masks have one entry
    assert len(keys[0] & keys[1]) == 1
    assert not keys[1] & keys[2]


def test_a_missing_entry_is_named(make: Make) -> None:
    data = cached(make())
    for shard in data.mask_requests()[0].store.folder.glob("shard-*"):
        index = read_index(shard)
        content = bytearray(shard.read_bytes())
        for key in {request.key for request in data.mask_requests()} & index.keys():
            content[index[key].start] ^= 1
        shard.write_bytes(content)
    with pytest.raises(DataError, match=r"mask of .*\.png"):
        batch(data)


def test_segmentation_applies_to_its_share_of_the_samples_by_their_indices(make: Make) -> None:
    data = cached(make("segmentation", masks={"masked_loss_probability": 0.5}))
    drawn = [
        bool((mask[..., 4:] == 0).all()) for index in range(100) for mask in batch(data, index).loss_mask
    ]
    assert 70 < sum(drawn) < 130
    others = [mask for index in range(20) for mask in batch(data, index).loss_mask if mask[0, 0, 7] != 0]
    assert all((mask == 1).all() for mask in others)
    # Two processes see the same samples with the same masks.
    halves_of = [
        cached(
            TrainingData(
                data.datasets,
                data.data,
                seed=42,
                batch_size=1,
                pixel_alignment=16,
                num_processes=2,
                process_index=process,
                conditioning=data.conditioning,
                masks=data.masks,
            )
        )
        for process in range(2)
    ]
    for index in range(10):
        both = torch.cat([batch(each, index).loss_mask for each in halves_of])
        assert torch.equal(both, batch(data, index).loss_mask)


@pytest.mark.parametrize(
    ("probability", "kind"), [(0.0, "segmentation"), (0.0, "mask"), (1.0, "segmentation")]
)
def test_masks_of_the_other_kind_always_apply(make: Make, probability: float, kind: str) -> None:
    data = cached(make(kind, masks={"masked_loss_probability": probability}))
    black = {bool((batch(data, index).loss_mask[..., 4:] == 0).all()) for index in range(10)}
    assert black == {kind == "mask" or probability == 1}


def test_the_alpha_channel_is_the_mask(make: Make, folders: tuple[Path, Path]) -> None:
    images, _ = folders
    for name in ("in/0", "1", "2", "3"):
        image = Image.open(images / f"{name}.png").convert("RGBA")
        image.putalpha(halves().convert("L"))
        paint(images, f"{name}.png", image)
    data = cached(make(conditioning_data=[], alpha_mask=True))
    assert len(data.samples) == 4
    assert batch(data).loss_mask[0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    image = Image.new("RGBA", (64, 64), (1, 2, 3, 0))
    paint(images, "1.png", image)
    paint(images, "2.png", Image.new("RGB", (64, 64)))
    data = cached(make(conditioning_data=[], alpha_mask=True))
    assert [each.path for each in data.skipped] == ["1.png"]


def test_a_cache_never_lies_among_the_masks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = folders
    with pytest.raises(DataError, match="masks"):
        TrainingData(
            [
                DatasetConfig(
                    id="photos", instance_data_dir=images, resolution=64, conditioning_data=["masks"]
                )
            ],
            DataConfig(cache_dir_vae=masks / "cache", cache_dir_text=tmp_path / "text"),
            conditioning=[ConditioningConfig(id="masks", instance_data_dir=masks, conditioning_type="mask")],
            seed=1,
            batch_size=1,
            pixel_alignment=16,
        )

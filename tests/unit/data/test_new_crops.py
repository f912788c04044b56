"""Random crops that are drawn anew in each epoch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.helpers.caching.filling import TEXT_ENCODER, VAE, encode_missing
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Batch, TextEmbeds
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.on_demand import OnDemand

NUM_IMAGES = 4
WIDE = (200, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 255, (WIDE[1], WIDE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def data_of(
    folder: Path, *, seed: int = 3, num_processes: int = 1, index: int = 0, **keys: object
) -> TrainingData:
    """Squares of the images; entries are the pixels themselves, and images of "kept" are cached."""
    own = {"instance_data_dir": folder / "images", "resolution": 64, "crop": True}
    datasets = [
        DatasetConfig(id="anew", vae_cache_clear_each_epoch=True, **own, **keys),
        DatasetConfig(id="kept", **own, **keys),
    ]
    folders = DataConfig(cache_dir_vae=folder / "vae", cache_dir_text=folder / "text")
    data = TrainingData(
        datasets,
        folders,
        seed=seed,
        batch_size=2 // num_processes,
        num_processes=num_processes,
        process_index=index,
        pixel_alignment=64,
    )
    data.set_encoders(vae_identity="vae", text_identity="clip")
    list(encode_missing(data.latents_requests(), _pixels, batch_size=1))
    known = {VAE: (_pixels, 1), TEXT_ENCODER: (_embeds, 1)}
    data.encode_on_demand(OnDemand(known, watch=LoaderWatch()))
    return data


def _pixels(pixels: list[Tensor]) -> list[dict[str, Tensor]]:
    return latents_entries(torch.stack(pixels))


def _embeds(texts: list[str]) -> list[dict[str, Tensor]]:
    return [text_entry(TextEmbeds(torch.zeros(1, 4, 2))) for _ in texts]


def taken(data: TrainingData, number: int, *, start: int = 0) -> list[Batch]:
    return list(islice(data.batches(start=start), number))


def crops(batches: list[Batch], dataset: str) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for sample in (each for batch in batches for each in batch.samples if each.dataset_id == dataset):
        found.setdefault(sample.path, []).append(sample.crop_top_left)
    return found


def test_each_epoch_has_crops_of_its_own_and_latents_of_them(folder: Path) -> None:
    data = data_of(folder, repeats=1)
    batches = taken(data, 3 * data.batches_per_epoch)
    for drawn in crops(batches, "anew").values():
        assert len(drawn) == 6
        assert drawn[::2] == drawn[1::2]  # two passes in each epoch
        assert len(set(drawn)) == 3
    assert {len(set(drawn)) for drawn in crops(batches, "kept").values()} == {1}
    for batch in batches:
        for sample, latents in zip(batch.samples, batch.latents, strict=True):
            pixels = np.asarray(Image.open(folder / "images" / sample.path), np.float32)
            top, left = sample.crop_top_left
            expected = torch.from_numpy(pixels[top : top + 64, left : left + 64] / 127.5 - 1).permute(2, 0, 1)
            assert torch.allclose(latents, expected, atol=1e-5)


def test_only_the_other_dataset_is_cached(folder: Path) -> None:
    data = data_of(folder)
    taken(data, 2 * data.batches_per_epoch)
    data.flush()
    assert len(data.latents_requests()) == NUM_IMAGES
    assert [each.parent.name for each in (folder / "vae").rglob("shard*")] == ["kept"]


def test_datasets_that_share_a_folder_of_latents_have_an_entry_each(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        Image.new("RGB", (64, 64), (40 * int(file.stem), 0, 0)).save(file)
    data = data_of(folder, cache_dir_vae=folder / "one")
    drawn = [sample.dataset_id for batch in taken(data, 12) for sample in batch.samples]
    assert drawn.count("anew") == drawn.count("kept") == 12
    assert not data.damaged


def test_a_resumed_run_and_several_processes_draw_the_same_crops(folder: Path) -> None:
    whole = taken(data_of(folder), 12)
    resumed = taken(data_of(folder), 5, start=7)
    assert [each.samples for each in resumed] == [each.samples for each in whole[7:]]
    assert all(
        torch.equal(ours.latents, theirs.latents) for ours, theirs in zip(resumed, whole[7:], strict=True)
    )
    parts = [taken(data_of(folder, num_processes=2, index=index), 12) for index in range(2)]
    assert [one.samples + other.samples for one, other in zip(*parts, strict=True)] == [
        each.samples for each in whole
    ]


def test_the_seed_selects_the_crops(folder: Path) -> None:
    one, other = (crops(taken(data_of(folder, seed=seed), 4), "anew") for seed in (1, 2))
    assert one != other


def test_a_mirrored_image_has_the_crop_of_its_epoch(folder: Path) -> None:
    data = data_of(folder, random_flip=True)
    batches = taken(data, 4 * data.batches_per_epoch)
    plain = taken(data_of(folder), 4 * data.batches_per_epoch)
    flipped = 0
    for ours, theirs in zip(batches, plain, strict=True):
        for sample, latents, expected in zip(ours.samples, ours.latents, theirs.latents, strict=True):
            flipped += sample.is_mirrored
            assert torch.equal(latents, expected.flip(-1) if sample.is_mirrored else expected)
    assert flipped == sum(map(len, batches)) // 2


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"crop": False}, "random crops"),
        ({"crop": True, "crop_style": "center"}, "random crops"),
        ({"crop": True, "dataset_type": "eval"}, "held-out images"),
        ({"crop": True, "alpha_mask": True}, "masks and references"),
        ({"crop": True, "conditioning_data": ["masks"]}, "masks and references"),
    ],
    ids=["no crop", "center", "held out", "alpha", "masks"],
)
def test_datasets_without_new_crops_are_refused(tmp_path: Path, keys: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DatasetConfig(id="x", instance_data_dir=tmp_path, vae_cache_clear_each_epoch=True, **keys)

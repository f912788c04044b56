"""Images that are also trained mirrored."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.helpers.caching.filling import encode_missing
from simpletuner.helpers.caching.latents import latents_entries, latents_key
from simpletuner.helpers.caching.masks import mask_entries
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Batch, Sample, Size, TextEmbeds
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.mirroring import is_mirrored, mirrored_sample

SAMPLE = Sample("cats", "0.png", "", Size(50, 90), Size(64, 128), (0, 13), Size(64, 64))


def write(folder: Path, number: int) -> None:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / "images", number)
    return tmp_path


def data_of(
    folder: Path, *, flip: bool = True, conditioning: str | None = None, eval_share: float = 0
) -> TrainingData:
    """A square of each image, cut at random; entries are the pixels themselves."""
    for name in ("masks", "before"):
        (folder / name).mkdir(exist_ok=True)
    entries = {
        "mask": ConditioningConfig(id="masks", instance_data_dir=folder / "masks", conditioning_type="mask"),
        "reference": ReferenceConfig(
            id="before", instance_data_dir=folder / "before", conditioning_type="reference_strict"
        ),
    }
    own = [entries[conditioning]] if conditioning else []
    dataset = DatasetConfig(
        id="cats",
        instance_data_dir=folder / "images",
        resolution=64,
        crop=True,
        random_flip=flip,
        eval_share=eval_share,
        conditioning_data=[each.id for each in own],
    )
    cache = folder / f"cache {flip}"
    folders = DataConfig(cache_dir_vae=cache / "vae", cache_dir_text=cache / "text")
    data = TrainingData([dataset], folders, seed=4, batch_size=1, pixel_alignment=64, conditioning=own)
    data.set_encoders(vae_identity="vae", text_identity="clip")
    list(encode_missing(data.latents_requests(), _pixels, batch_size=1))
    list(encode_missing(data.mask_requests(), mask_entries, batch_size=1))
    list(encode_missing(data.text_requests(), _embeds, batch_size=1))
    return data


def _pixels(pixels: list[Tensor]) -> list[dict[str, Tensor]]:
    return latents_entries(torch.stack(pixels))


def _embeds(texts: list[str]) -> list[dict[str, Tensor]]:
    return [text_entry(TextEmbeds(torch.zeros(1, 4, 2))) for _ in texts]


def taken(data: TrainingData, number: int) -> list[Batch]:
    return list(islice(data.batches(), number))


def test_each_image_is_mirrored_in_every_second_pass(folder: Path) -> None:
    plain, both = taken(data_of(folder, flip=False), 12), taken(data_of(folder), 12)
    assert [each.samples[0].path for each in plain] == [each.samples[0].path for each in both]
    seen: dict[str, list[bool]] = {}
    for ours, theirs in zip(both, plain, strict=True):
        sample = ours.samples[0]
        seen.setdefault(sample.path, []).append(sample.is_mirrored)
        assert torch.equal(ours.latents, theirs.latents.flip(-1) if sample.is_mirrored else theirs.latents)
    assert all(turns in ([True, False] * 2, [False, True] * 2) for turns in seen.values())
    assert {turns[0] for turns in seen.values()} == {True, False}


def test_both_are_cached_and_the_plain_one_keeps_its_key(folder: Path) -> None:
    requests = data_of(folder).latents_requests()
    assert len({each.key for each in requests}) == 6
    assert {each.key for each in data_of(folder, flip=False).latents_requests()} < {
        each.key for each in requests
    }


def test_the_crop_of_a_mirrored_image_is_where_it_lies_there() -> None:
    found = mirrored_sample(SAMPLE)
    assert (found.crop_top_left, found.is_mirrored) == ((0, 128 - 13 - 64), True)
    assert mirrored_sample(found) == SAMPLE
    centred = Sample("cats", "0.png", "", Size(64, 128), Size(64, 128), (0, 32), Size(64, 64))
    keys = {
        latents_key(each, image_digest="a", vae_identity="vae")
        for each in (centred, mirrored_sample(centred))
    }
    assert len(keys) == 2


def test_references_are_mirrored_with_their_image(folder: Path) -> None:
    for number in range(3):
        write(folder / "before", number)  # the images themselves
    for batch in taken(data_of(folder, conditioning="reference"), 6):
        assert torch.equal(batch.references[0], batch.latents)


def test_references_of_held_out_images_are_not_mirrored(folder: Path) -> None:
    for number in range(3):
        write(folder / "before", number)
    data = data_of(folder, conditioning="reference", eval_share=0.5)
    num_trained, num_held_out = len(data.samples), len(data.divided.held_out)
    assert num_trained + num_held_out == 3
    assert num_trained
    assert num_held_out
    assert len(data.latents_requests()) == 2 * (2 * num_trained + num_held_out)


def test_the_mask_is_mirrored_with_its_image(folder: Path) -> None:
    (folder / "masks").mkdir()
    for number in range(3):
        # The left half of the stored image is learnt.
        Image.fromarray(np.repeat([[255] * 64 + [0] * 64], 64, axis=0).astype(np.uint8)).save(
            folder / "masks" / f"{number}.png"
        )
    batches = taken(data_of(folder, conditioning="mask"), 6)
    assert {batch.samples[0].is_mirrored for batch in batches} == {True, False}
    for batch in batches:
        assert batch.loss_mask is not None
        row = batch.loss_mask[0, 0, 0]
        left, right = float(row[:8].mean()), float(row[-8:].mean())
        assert (left < right) is batch.samples[0].is_mirrored


def test_the_first_turn_of_an_image_is_its_own() -> None:
    images = [
        Sample("cats", f"{number}.png", "", *[Size(1, 1)] * 2, (0, 0), Size(1, 1)) for number in range(200)
    ]
    first = [is_mirrored(each, seed=1, pass_index=0) for each in images]
    assert 60 < sum(first) < 140
    assert [is_mirrored(each, seed=1, pass_index=1) for each in images] == [not each for each in first]
    assert first != [is_mirrored(each, seed=2, pass_index=0) for each in images]

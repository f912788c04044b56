"""What the cache holds of an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.caching.latents import latents_entries, latents_key, read_latents
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.contracts import Sample, Size

SAMPLE = Sample(
    dataset_id="d",
    path="a.png",
    caption="a cat",
    original_px=Size(100, 200),
    resized_px=Size(64, 128),
    crop_top_left=(0, 32),
    target_px=Size(64, 64),
)


def key(sample: Sample = SAMPLE, *, image_digest: str = "0" * 32, vae_identity: str = "vae") -> str:
    return latents_key(sample, image_digest=image_digest, vae_identity=vae_identity)


def test_latents_come_back_as_float32(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    latents = torch.randn(2, 4, 8, 8).bfloat16()
    entries = latents_entries(latents)
    store.put(key(), entries[1], metadata={})
    found = read_latents(store, key())
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, latents[1].float())
    assert read_latents(store, key(vae_identity="another")) is None


def test_key_is_that_of_existing_caches() -> None:
    assert key() == "194b7c85d08f3c605b225a625245b438"


@pytest.mark.parametrize(
    "change", [{"resized_px": Size(64, 130)}, {"crop_top_left": (0, 31)}, {"target_px": Size(64, 72)}]
)
def test_key_changes_with_the_crop(change: dict[str, object]) -> None:
    assert key(replace(SAMPLE, **change)) != key()


def test_key_changes_with_image_and_vae_and_not_with_name_or_caption() -> None:
    assert len({key(), key(image_digest="1" * 32), key(vae_identity="another")}) == 3
    assert key(replace(SAMPLE, dataset_id="e", path="b.png", caption="a dog")) == key()

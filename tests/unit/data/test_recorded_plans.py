"""Facts, keys, samples and order of datasets, which checkpoints and caches hold, stay what they were."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.dataset import TrainingData

SIZES = [(64, 64), (128, 64), (64, 128), (100, 75), (75, 100), (200, 64), (333, 250), (64, 64)] * 3
# Options -> hashes of: digests, captions by image, latents requests, text requests, samples, order, captions.
RECORDED: dict[str, tuple[dict[str, Any], str]] = {
    "plain": (
        {},
        "d8a2e66184b64518 c9cbef510cb6ee14 0ae19e4ab5093ae0 bc13bb10439a0da7 "
        "e2e112abdbca08e8 db12d46f3c675573 0d2af508b6746a0a",
    ),
    "drawn crops": (
        {"crop": True, "crop_style": "random"},
        "d8a2e66184b64518 c9cbef510cb6ee14 f813c8da406ec1ac bc13bb10439a0da7 "
        "f1610764671a1028 843369b08256a791 0d2af508b6746a0a",
    ),
    "square crops and a prefix": (
        {"crop": True, "crop_aspect": "square", "caption_prefix": "sks", "resolution_type": "pixel"},
        "d8a2e66184b64518 199ee31db67eefb1 f813c8da406ec1ac 502736056b7ed3b4 "
        "76fa5c5e36ed78ba 843369b08256a791 b08510d829f89369",
    ),
    "nine images": (
        {"max_num_samples": 9, "instance_prompt": "a b", "prepend_instance_prompt": True},
        "27f5dc7fe1b1a11f e0d1d14cf492e048 e5497afa9fe69723 073148fb40b558a2 "
        "816161855cadb013 4b68bcd6b049418e 6d087f6f0f04aa8b",
    ),
    "shuffled tags": (
        {"caption_shuffle": {"enable": True, "count": 2}, "caption_dropout_probability": 0.2},
        "d8a2e66184b64518 720d749a83d74ef3 0ae19e4ab5093ae0 060d00ba6f263e22 "
        "e2e112abdbca08e8 db12d46f3c675573 3eb3acbee8806cd2",
    ),
    "file names": (
        {"caption_strategy": "filename"},
        "d8a2e66184b64518 a02a3b45ceefcb3b 0ae19e4ab5093ae0 2640817acfa021f6 "
        "fd41b3553ec27712 db12d46f3c675573 9ecb3a020e5abe94",
    ),
}


def bmp(width: int, height: int, seed: int) -> bytes:
    """An image whose bytes depend on no library."""
    row = (width * 3 + 3) // 4 * 4
    head = b"BM" + struct.pack("<IHHI", 54 + row * height, 0, 0, 54)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, row * height, 2835, 2835, 0, 0)
    return head + bytes((seed * 7 + i * 3) % 256 for i in range(row)) * height


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "photos"
    (folder / "in").mkdir(parents=True)
    for number, (width, height) in enumerate(SIZES):
        file = folder / ("in" if number % 3 == 0 else "") / f"{number:02}.bmp"
        file.write_bytes(bmp(width, height, number))
        if number % 4:
            more = "\nanother line" if number % 8 == 1 else ""
            file.with_suffix(".txt").write_text(f"photo {number}, wide, big{more}")
    return folder


def hash_of_text(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def hash_of(value: object) -> str:
    return hash_of_text(repr(value))


@pytest.mark.parametrize("name", RECORDED)
def test_a_plan_is_what_it_was(name: str, photos: Path, tmp_path: Path) -> None:
    options, recorded = RECORDED[name]
    keys = {"resolution": 64, "resolution_type": "pixel_area", **options}
    config = DatasetConfig(id="photos", instance_data_dir=photos, **keys)
    folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
    for _ in range(2):  # the second start takes them from the index
        data = TrainingData([config], folders, seed=7, batch_size=2, pixel_alignment=64)
        data.set_encoders(vae_identity="vae", text_identity="clip")
        draws = [data._curriculum.draw(index) for index in range(30)]
        facts = data.facts()
        latents = [(r.key, r.name, r.batch_group, dict(r.metadata)) for r in data.latents_requests()]
        texts = data.text_requests(["a prompt"])
        found = [
            facts["dataset photos, hash of all images"],
            facts["dataset photos, hash of all captions"],
            hash_of(latents),
            hash_of([(r.key, r.name, r.is_read_at_once, dict(r.metadata)) for r in texts]),
            # Recorded before images were mirrored.
            hash_of_text(repr(list(data.samples)).replace(", is_mirrored=False", "")),
            hash_of([[data._buckets[d.bucket][1][row].sample.path for row in d.samples] for d in draws]),
            hash_of(data.captions()),
        ]
        assert " ".join(map(str, found)) == recorded

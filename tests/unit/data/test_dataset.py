"""Datasets on disk to batches: scanned, cached, ordered, reproducible."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torch import Tensor

from simpletuner.helpers.caching import store
from simpletuner.helpers.caching.filling import CacheRequest, encode_missing
from simpletuner.helpers.caching.latents import latents_entries, latents_key
from simpletuner.helpers.caching.shards import read_index
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig, TrainingConfig
from simpletuner.helpers.contracts import Batch, Size, TextEmbeds
from simpletuner.helpers.data import pixels
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.pixels import load_pixels
from simpletuner.helpers.errors import DataError, TrainingError
from simpletuner.helpers.io.faults import StorageError, at_crash_points
from tests.unit.data.icc_profiles import icc_profile

Make = Callable[..., TrainingData]


class Encoders:
    """Stand-ins for a VAE and text encoders, which count what they are given."""

    def __init__(self) -> None:
        self.images = 0
        self.prompts: list[str] = []

    def latents(self, pixels: list[Tensor]) -> list[dict[str, Tensor]]:
        self.images += len(pixels)
        return latents_entries(torch.nn.functional.avg_pool2d(torch.stack(pixels), 8))

    def text(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        self.prompts.extend(prompts)
        embeds = [
            TextEmbeds(
                prompt_embeds=torch.full((1, 4, 2), float(len(prompt))),
                pooled=torch.full((1, 3), float(len(prompt))),
            )
            for prompt in prompts
        ]
        return [text_entry(each) for each in embeds]


def paint(folder: Path, name: str, size: tuple[int, int] = (64, 64), *, caption: str | None = None) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    color = np.random.default_rng(sum(name.encode())).integers(0, 256, 3)
    Image.new("RGB", size, tuple(map(int, color))).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(8):
        paint(tmp_path / "photos", f"{number}.png", caption=f"photo {'x' * number}")
    return tmp_path / "photos"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*folders: Path, **options: object) -> TrainingData:
        own = {
            name: options.pop(name)
            for name in list(options)
            if name in ("seed", "batch_size", "num_processes", "process_index", "caption_dropout")
        }
        alignment = options.pop("aspect_bucket_alignment", None)
        memory = options.pop("text_cache_memory", 2.0)
        datasets = [
            DatasetConfig(id=folder.name, instance_data_dir=folder, **{"resolution": 64, **options})
            for folder in folders
        ]
        data = DataConfig(
            cache_dir_vae=tmp_path / "cache" / "vae",
            cache_dir_text=tmp_path / "cache" / "text",
            aspect_bucket_alignment=alignment,
            text_cache_memory=memory,
        )
        return TrainingData(datasets, data, **{"seed": 42, "batch_size": 2, "pixel_alignment": 64, **own})

    return made


def fill(
    requests: list[CacheRequest], encode: Callable[..., list[dict[str, Tensor]]], **options: Any
) -> list[tuple[int, int]]:
    """Fill a cache; gives the progress."""
    return list(encode_missing(requests, encode, **{"batch_size": 4, **options}))


def cached(data: TrainingData, encoders: Encoders | None = None) -> TrainingData:
    encoders = encoders or Encoders()
    data.set_encoders(vae_identity="vae", text_identity="clip")
    fill(data.latents_requests(), encoders.latents)
    fill(data.text_requests(), encoders.text)
    return data


def taken(data: TrainingData, number: int, *, start: int = 0) -> list[Batch]:
    batches = data.batches(start=start)
    try:
        return list(islice(batches, number))
    finally:
        assert isinstance(batches, Iterator)
        batches.close()


def shape(batches: list[Batch]) -> list[tuple[list[str], list[str], tuple[int, ...]]]:
    """What identifies batches: paths, captions, sample indices."""
    return [
        ([sample.path for sample in batch.samples], [s.caption for s in batch.samples], batch.sample_indices)
        for batch in batches
    ]


def test_batches_hold_the_latents_and_text_of_their_samples(make: Make, photos: Path) -> None:
    data = cached(make(photos))
    assert data.batches_per_epoch == 4
    seen = Counter()
    for batch in taken(data, 4):
        assert batch.latents.shape == (2, 3, 8, 8)
        assert batch.latents.dtype == torch.float32
        for sample, latents, tokens in zip(
            batch.samples, batch.latents, batch.text.prompt_embeds, strict=True
        ):
            with Image.open(photos / sample.path) as image:
                color = torch.tensor(image.getpixel((0, 0))) / 127.5 - 1
            torch.testing.assert_close(latents.mean((1, 2)), color)
            assert tokens[0, 0] == len(sample.caption)
            seen[sample.path] += 1
    assert set(seen.values()) == {1}
    assert len(seen) == 8


def test_every_tensor_of_a_batch_is_pinned_for_cuda_alone(
    make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(tuple(self.shape)) or self)
    taken(cached(make(photos)), 1)
    assert pinned == []
    data = cached(make(photos))
    data.pins_batches = True
    taken(data, 1)
    assert pinned[:3] == [(2, 3, 8, 8), (2, 4, 2), (2, 3)]


def test_sample_indices_count_every_sample_of_the_run_once(make: Make, photos: Path) -> None:
    parts = [
        taken(cached(make(photos, batch_size=2, num_processes=2, process_index=index)), 6) for index in (0, 1)
    ]
    sample_indices = [index for part in parts for batch in part for index in batch.sample_indices]
    assert sorted(sample_indices) == list(range(24))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.reliability_row(8)
def test_two_processes_see_the_global_batches_of_one(make: Make, photos: Path, dropout: float) -> None:
    paint(photos, "wide.png", (128, 64), caption="wide")
    whole = taken(cached(make(photos, batch_size=4, caption_dropout=dropout)), 10)
    halves = [
        taken(
            cached(make(photos, batch_size=2, num_processes=2, process_index=index, caption_dropout=dropout)),
            10,
        )
        for index in (0, 1)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch.samples == first.samples + second.samples
        assert batch.sample_indices == first.sample_indices + second.sample_indices
        assert torch.equal(batch.latents, torch.cat([first.latents, second.latents]))


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 11])
@pytest.mark.reliability_row(4)
def test_starting_at_k_equals_skipping_k(make: Make, photos: Path, start: int) -> None:
    data = cached(make(photos, caption_dropout=0.3))
    assert shape(taken(data, 4, start=start)) == shape(taken(data, start + 4)[start:])


@pytest.mark.reliability_row(4)
def test_a_far_start_is_found_at_once(make: Make, photos: Path) -> None:
    (batch,) = taken(cached(make(photos)), 1, start=10**9)
    assert batch.sample_indices == (2 * 10**9, 2 * 10**9 + 1)


@pytest.mark.parametrize(
    ("repeats", "probability", "batches"), [(0, 1.0, 4), (2, 1.0, 12), (0, 0.5, 2), (1, 2.0, 16)]
)
def test_repeats_and_probability_set_the_length_of_an_epoch(
    make: Make, photos: Path, repeats: int, probability: float, batches: int
) -> None:
    data = make(photos, repeats=repeats, probability=probability)
    assert data.batches_per_epoch == batches


@settings(max_examples=25, deadline=None)
@given(wide=st.integers(0, 3), tall=st.integers(1, 3), repeats=st.integers(0, 2), seed=st.integers(0, 99))
@pytest.mark.reliability_row(32)
def test_each_image_is_seen_repeats_plus_one_times_per_epoch(
    tmp_path_factory: pytest.TempPathFactory, wide: int, tall: int, repeats: int, seed: int
) -> None:
    root = tmp_path_factory.mktemp("run")
    for number in range(2 * wide):
        paint(root / "photos", f"wide {number}.png", (128, 64))
    for number in range(2 * tall):
        paint(root / "photos", f"tall {number}.png", (64, 128))
    config = DatasetConfig(id="p", instance_data_dir=root / "photos", resolution=64, repeats=repeats)
    folders = DataConfig(cache_dir_vae=root / "cache", cache_dir_text=root / "cache")
    data = cached(TrainingData([config], folders, seed=seed, batch_size=2, pixel_alignment=32))
    seen = Counter()
    for batch in taken(data, data.batches_per_epoch):
        assert len({sample.target_px for sample in batch.samples}) == 1
        seen.update(sample.path for sample in batch.samples)
    assert len(seen) == 2 * (wide + tall)
    assert set(seen.values()) == {repeats + 1}


@pytest.mark.reliability_row(29)
def test_one_image_fills_a_batch_of_eight_and_says_so(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paint(tmp_path / "one", "cat.png")
    data = cached(make(tmp_path / "one", batch_size=8))
    assert data.batches_per_epoch == 1
    assert [len(batch) for batch in taken(data, 2)] == [8, 8]
    assert re.search(r"1 bucket has .* batch of 8.*one 64x64 \(1\)", caplog.text)


@pytest.mark.parametrize(
    ("balances", "per_epoch"), [(False, (6, 2)), (True, (6, 6))], ids=["as is", "balanced"]
)
def test_regularisation_images_are_drawn_as_often_as_others_if_that_is_asked(
    tmp_path: Path, balances: bool, per_epoch: tuple[int, int]
) -> None:
    for folder, number in (("subject", 3), ("class", 2)):
        for index in range(number):
            paint(tmp_path / folder, f"{index}.png")
    common = {"resolution": 64}
    datasets = [
        DatasetConfig(id="subject", instance_data_dir=tmp_path / "subject", repeats=1, **common),
        DatasetConfig(
            id="class", instance_data_dir=tmp_path / "class", is_regularisation_data=True, **common
        ),
    ]
    data = cached(
        TrainingData(
            datasets,
            DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text"),
            seed=42,
            batch_size=2,
            pixel_alignment=64,
            balances_regularisation=balances,
        )
    )
    batches = taken(data, data.batches_per_epoch)
    drawn = Counter(sample.dataset_id for batch in batches for sample in batch.samples)
    assert (drawn["subject"], drawn["class"]) == per_epoch
    for batch in batches:
        assert {sample.dataset_id for sample in batch.samples} == {
            "class" if batch.is_regularisation else "subject"
        }


@pytest.mark.reliability_row(29)
def test_two_datasets_and_several_buckets_never_mix_in_a_batch(make: Make, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for size in ((64, 64), (128, 64), (64, 192)):
            paint(tmp_path / folder, f"{size[0]}x{size[1]}.png", size)
    data = cached(make(tmp_path / "a", tmp_path / "b", aspect_bucket_alignment=16))
    assert data.batches_per_epoch == 6
    for batch in taken(data, 12):
        assert len({(sample.dataset_id, sample.target_px) for sample in batch.samples}) == 1


@pytest.mark.reliability_row(13)
def test_unusable_images_are_skipped_and_listed_once(
    make: Make, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "page.jpg").write_bytes(b"<html>")
    (photos / "empty.png").write_bytes(b"")
    cut = photos / "cut.png"
    cut.write_bytes((photos / "1.png").read_bytes()[:20])
    paint(photos, "small.png", (10, 10))
    for _ in range(2):  # the second time out of the index
        caplog.clear()
        data = make(photos, minimum_image_size=32)
        reasons = {each.path: each.reason for each in data.skipped}
        assert sorted(reasons) == ["cut.png", "empty.png", "page.jpg", "small.png"]
        assert "web page" in reasons["page.jpg"]
        assert re.search(r"10x10 px .*minimum_image_size 32", reasons["small.png"])
        assert len(data.samples) == 8
        assert all(caplog.text.count(f"skipped {name}") == 1 for name in reasons)


def damage(file: Path) -> None:
    """Leave the header and a part of the pixels."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 30])


def filled(data: TrainingData, encoders: Encoders | None = None) -> TrainingData:
    """The data as a run sees it after its caches were filled."""
    cached(data, encoders).leave_out(data.damaged)
    return data


@pytest.mark.reliability_row(13)
def test_damage_found_while_caching_is_listed_like_other_skipped_images(
    make: Make, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "page.jpg").write_bytes(b"<html>")
    damage(photos / "2.png")
    encoders = Encoders()
    with caplog.at_level(logging.INFO):
        data = make(photos)
        assert len(data.samples) == 8
        filled(data, encoders)
    assert encoders.images == 7
    assert [each.path for each in data.skipped] == ["page.jpg", "2.png"]
    assert "damaged" in data.skipped[1].reason
    assert caplog.text.count("skipped 2.png: it is damaged") == 1
    assert "7 images (2 skipped)" in caplog.text
    assert "2.png" not in {sample.path for sample in data.samples}
    assert "photo xx" not in data.captions()
    drawn = {sample.path for batch in taken(data, 8) for sample in batch.samples}
    assert drawn == {f"{number}.png" for number in (0, 1, 3, 4, 5, 6, 7)}


def test_later_runs_skip_a_damaged_image_in_their_scan_and_see_the_same_batches(
    make: Make, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(photos / "2.png")
    first = filled(make(photos))
    for _ in range(2):  # the index is written by the scan too
        caplog.clear()
        later = make(photos)
        assert caplog.text.count("skipped 2.png: it is damaged") == 1
    encoders = Encoders()
    assert cached(later, encoders).damaged == {}
    assert encoders.images == 0
    assert later.skipped == first.skipped
    assert later.batches_per_epoch == first.batches_per_epoch == 4
    assert shape(taken(later, 12)) == shape(taken(first, 12))


def test_a_repaired_image_is_trained_again(make: Make, photos: Path) -> None:
    content = (photos / "2.png").read_bytes()
    damage(photos / "2.png")
    assert len(filled(make(photos)).samples) == 7
    (photos / "2.png").write_bytes(content)
    assert len(filled(make(photos)).samples) == 8


def test_every_process_leaves_out_what_one_of_them_found(make: Make, photos: Path) -> None:
    for number in (2, 5):
        damage(photos / f"{number}.png")
    processes = [make(photos, batch_size=1, num_processes=2, process_index=index) for index in range(2)]
    for index, data in enumerate(processes):
        data.set_encoders(vae_identity="vae", text_identity="clip")
        fill(data.latents_requests(), Encoders().latents, shard=(index, 2))
        fill(data.text_requests(), Encoders().text)
    found = [data.damaged for data in processes]
    assert [len(each) for each in found] == [1, 1]
    for data in processes:
        data.leave_out(found[0] | found[1])
    batches = [[batch.samples[0].path for batch in taken(data, 6)] for data in processes]
    assert len(set(batches[0][:3] + batches[1][:3])) == 6
    assert make(photos).samples == processes[0].samples


def test_max_num_samples_takes_the_same_images_once_damage_is_known(make: Make, photos: Path) -> None:
    first = make(photos, max_num_samples=4)
    damage(photos / first.samples[1].path)
    found = filled(make(photos, max_num_samples=4))
    assert len(found.samples) == 3
    assert make(photos, max_num_samples=4).samples == found.samples


def test_a_dataset_whose_images_are_all_damaged_is_an_error_that_says_why(make: Make, photos: Path) -> None:
    for file in photos.glob("*.png"):
        damage(file)
    with pytest.raises(DataError, match=r"no image in .* can be used .*damaged"):
        filled(make(photos))
    with pytest.raises(DataError, match=r"no image in .* can be used .*damaged"):
        make(photos)


def test_latents_of_other_images_stay_valid_where_colours_are_read_anew(make: Make, photos: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear = icc_profile("RGB", gamma=1.0, name="linear sRGB")
    for name, profile in {"0.png": srgb, "1.png": linear}.items():
        Image.new("RGB", (64, 64), (55, 55, 55)).save(photos / name, icc_profile=profile)
    data = make(photos)
    data.set_encoders(vae_identity="vae", text_identity="clip")
    for image, request in zip(data.divided.trained[0].images, data.latents_requests(), strict=True):
        key = latents_key(image.sample, image_digest=image.digest, vae_identity="vae")
        assert (request.key == key) == (image.sample.path != "1.png")


def test_pixels_that_do_not_fit_into_memory_end_the_run(
    make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(pixels, "decode_image", decode)
    data = make(photos)
    with pytest.raises(TrainingError, match=r"0\.png: 64x64 px .*memory"):
        cached(data)
    assert data.damaged == {}


@pytest.mark.parametrize("content", [None, b"<html>"])
def test_a_dataset_without_a_usable_image_is_an_error_that_says_why(
    make: Make, tmp_path: Path, content: bytes | None
) -> None:
    (tmp_path / "photos").mkdir()
    if content is not None:
        (tmp_path / "photos" / "page.jpg").write_bytes(content)
    reason = "there are no images" if content is None else "page.jpg: it holds a web page"
    with pytest.raises(DataError, match=f"no image in .*photos can be used .{reason}"):
        make(tmp_path / "photos")


@pytest.mark.reliability_row(15)
def test_captions_that_are_not_utf8_are_one_error_that_names_the_files(make: Make, photos: Path) -> None:
    (photos / "1.txt").write_bytes("Kätzchen".encode("latin-1"))
    (photos / "2.txt").write_bytes(b"a\0b")
    with pytest.raises(
        DataError, match=r"2 captions cannot be used: .*1\.txt: it is not UTF-8.*2\.txt: .*NUL"
    ):
        make(photos)


@pytest.mark.reliability_row(15)
def test_missing_and_empty_captions_are_counted_and_train_unconditionally(
    make: Make, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "1.txt").unlink()
    (photos / "2.txt").write_bytes(b" \r\n")
    data = make(photos)
    assert [sample.caption for sample in data.samples[1:3]] == ["", ""]
    for note, name in (("missing", "1.png"), ("empty", "2.png")):
        assert re.search(rf"1 caption is {note}: {name}.*without a caption", caplog.text)
    caplog.clear()
    sks = {"prepend_instance_prompt": True, "instance_prompt": "sks"}
    assert make(photos, **sks).samples[1].caption == "sks"
    assert re.search(r"1 caption is missing: 1\.png.*instance_prompt alone", caplog.text)


@pytest.mark.reliability_row(16)
def test_two_images_with_one_text_file_are_an_error(make: Make, photos: Path) -> None:
    paint(photos, "1.jpg")
    with pytest.raises(DataError, match=r"1\.txt could be the caption of 1\.jpg or 1\.png"):
        make(photos)
    assert len(make(photos, caption_strategy="filename").samples) == 9


@pytest.mark.reliability_row(16)
def test_equal_images_in_two_places_share_one_cache_entry(make: Make, photos: Path) -> None:
    (photos / "sub").mkdir()
    (photos / "sub" / "0.png").write_bytes((photos / "0.png").read_bytes())
    encoders = Encoders()
    data = make(photos)
    assert len(data.samples) == 9
    data.set_encoders(vae_identity="vae", text_identity="clip")
    assert fill(data.latents_requests(), encoders.latents) == [(4, 8), (8, 8)]
    assert encoders.images == 8


@pytest.mark.parametrize(
    ("options", "caption"),
    [
        ({}, "photo x"),
        ({"caption_strategy": "filename"}, "1"),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "sks"}, "sks"),
        ({"only_instance_prompt": True, "instance_prompt": "sks"}, "sks"),
        ({"prepend_instance_prompt": True, "instance_prompt": "sks"}, "sks photo x"),
    ],
)
def test_captions_follow_the_strategy(
    make: Make, photos: Path, options: dict[str, object], caption: str
) -> None:
    assert make(photos, **options).samples[1].caption == caption


def test_captions_are_file_names_where_there_are_no_text_files(make: Make, tmp_path: Path) -> None:
    paint(tmp_path / "photos", "a_red_square.png")
    assert make(tmp_path / "photos").captions() == ("a red square",)


def test_each_line_of_a_text_file_is_drawn_and_encoded(make: Make, tmp_path: Path) -> None:
    paint(tmp_path / "one", "cat.png", caption="a cat\r\na tabby\r\n")
    data = cached(make(tmp_path / "one", batch_size=4))
    assert data.captions() == ("a cat", "a tabby")
    seen = {sample.caption for batch in taken(data, 8) for sample in batch.samples}
    assert seen == {"a cat", "a tabby"}


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.5, 80, 120), (1.0, 200, 200)])
def test_caption_dropout_empties_its_share_of_captions(
    make: Make, photos: Path, dropout: float, low: int, high: int
) -> None:
    data = cached(make(photos, caption_dropout=dropout))
    assert ("" in data.captions()) == (dropout > 0)
    empty = sum(sample.caption == "" for batch in taken(data, 100) for sample in batch.samples)
    assert low <= empty <= high


def test_caches_are_filled_once_and_by_content(make: Make, photos: Path) -> None:
    encoders = Encoders()

    def encoded(data: TrainingData) -> tuple[int, int]:
        encoders.images, encoders.prompts = 0, []
        fill(data.latents_requests(), encoders.latents)
        fill(data.text_requests(["a prompt"]), encoders.text)
        return encoders.images, len(encoders.prompts)

    data, again = make(photos), make(photos)
    data.set_encoders(vae_identity="vae", text_identity="clip")
    assert encoded(data) == (8, 9)
    again.set_encoders(vae_identity="vae", text_identity="clip")
    assert encoded(again) == (0, 0)
    again.set_encoders(vae_identity="another vae", text_identity="clip")
    assert encoded(again) == (8, 0)
    again.set_encoders(vae_identity="another vae", text_identity="t5")
    assert encoded(again) == (0, 9)
    assert again.text_embeds("photo xx").prompt_embeds[0, 0, 0] == len("photo xx")


@pytest.mark.reliability_row(17)
def test_an_image_edited_in_place_and_a_changed_caption_are_encoded_again(make: Make, photos: Path) -> None:
    file = photos / "1.png"
    Image.new("RGB", (64, 64), "red").save(file, "BMP")  # of one length in every colour
    cached(make(photos))
    before = file.stat()
    Image.new("RGB", (64, 64), "blue").save(file, "BMP")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    (photos / "3.txt").write_text("another caption", encoding="utf-8")
    encoders = Encoders()
    data = cached(make(photos), encoders)
    assert encoders.images == 1
    assert encoders.prompts == ["another caption"]
    latents = {
        sample.path: latents
        for batch in taken(data, 4)
        for sample, latents in zip(batch.samples, batch.latents, strict=True)
    }
    assert latents["1.png"].mean((1, 2)).tolist() == [-1.0, -1.0, 1.0]


@pytest.mark.reliability_row(18)
def test_shards_that_are_cut_are_encoded_again(make: Make, photos: Path, tmp_path: Path) -> None:
    cached(make(photos))
    shards = list((tmp_path / "cache").rglob("shard-*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-3])
    encoders = Encoders()
    cached(make(photos), encoders)
    assert encoders.images == 8
    assert len(encoders.prompts) == 8


def spoil(store: TensorStore, key: str) -> None:
    """Change one byte of an entry on disk."""
    shard = next(each for each in store.folder.glob("shard-*") if key in read_index(each))
    start = read_index(shard)[key].start
    data = bytearray(shard.read_bytes())
    data[start] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.reliability_row(18)
def test_the_next_image_of_the_bucket_takes_the_place_of_one_whose_entry_is_damaged(
    make: Make, photos: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    whole = cached(make(photos))
    expected = shape(taken(whole, 16))
    number = next(index for index, each in enumerate(whole.samples) if each.path == "3.png")
    request = (whole.latents_requests() if kind == "latents" else whole.text_requests())[number]
    spoil(request.store, request.key)
    encoders = Encoders()
    data = cached(make(photos), encoders)
    assert (encoders.images, encoders.prompts) == (0, []), "nothing is read before it is used"
    with caplog.at_level(logging.ERROR):
        found = shape(taken(data, 16))
    put_in = whole.samples[number + 1].path
    assert [[put_in if path == "3.png" else path for path in paths] for paths, *_ in expected] == [
        paths for paths, *_ in found
    ]
    assert [indices for *_, indices in expected] == [indices for *_, indices in found]
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "3.png" in record.getMessage()
    cached(make(photos), encoders)
    assert (encoders.images, len(encoders.prompts)) == ((1, 0) if kind == "latents" else (0, 1))
    assert shape(taken(cached(make(photos)), 16)) == expected


@pytest.mark.reliability_row(18)
def test_a_prompt_of_validation_whose_entry_is_damaged_is_encoded_at_the_start(
    make: Make, photos: Path
) -> None:
    data = cached(make(photos))
    fill(data.text_requests(["a prompt"]), Encoders().text)
    request = data.text_requests(["a prompt"])[-1]
    spoil(request.store, request.key)
    encoders = Encoders()
    later = make(photos)
    later.set_encoders(vae_identity="vae", text_identity="clip")
    fill(later.text_requests(["a prompt"]), encoders.text)
    assert encoders.prompts == ["a prompt"]


@pytest.mark.parametrize(("memory", "num_reads"), [(2.0, 8), (0.0, 16)])
def test_a_caption_is_read_once_within_text_cache_memory(
    make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch, memory: float, num_reads: int
) -> None:
    data = cached(make(photos, text_cache_memory=memory))
    read: list[str] = []

    def counted_get(self: TensorStore, key: str) -> dict[str, Tensor] | None:
        if self.folder.name == "text":
            read.append(key)
        return get(self, key)

    get = TensorStore.get
    monkeypatch.setattr(TensorStore, "get", counted_get)
    taken(data, 8)  # two passes over eight images; the loader reads one batch ahead
    assert len(read) - (0 if memory else 2) in (num_reads, num_reads - 2)


@pytest.mark.parametrize("change", [{"resolution": 128}, {"crop": True, "seed": 1}])
@pytest.mark.reliability_row(18)
def test_another_resolution_or_crop_is_another_entry(
    make: Make, tmp_path: Path, change: dict[str, object]
) -> None:
    for number in range(4):
        paint(tmp_path / "photos", f"{number}.png", (640, 64))
    cached(make(tmp_path / "photos", crop=True))
    encoders = Encoders()
    cached(make(tmp_path / "photos", **change), encoders)
    assert encoders.images == 4


def test_a_lost_entry_in_mid_run_is_an_error_that_names_the_image(
    make: Make, photos: Path, tmp_path: Path
) -> None:
    data = cached(make(photos))
    for entry in (tmp_path / "cache" / "vae").rglob("shard-*.safetensors"):
        entry.write_bytes(b"")
    with pytest.raises(DataError, match=r"\d\.png .dataset 'photos'. .*cache"):
        taken(data, 1)


def test_an_image_that_changes_after_the_scan_is_an_error_that_names_it(make: Make, photos: Path) -> None:
    data = make(photos)
    (photos / "1.png").write_bytes((photos / "2.png").read_bytes())
    with pytest.raises(DataError, match=r"1\.png: .*changed"):
        cached(data)


def test_a_prompt_that_was_never_encoded_is_an_error_that_names_it(make: Make, photos: Path) -> None:
    with pytest.raises(DataError, match=r"text .*'unknown'"):
        cached(make(photos)).text_embeds("unknown")


def test_the_work_of_caching_is_shared_between_processes(make: Make, photos: Path) -> None:
    parts = [make(photos, batch_size=1, num_processes=3, process_index=index) for index in range(3)]
    encoders = Encoders()
    for index, data in enumerate(parts):
        data.set_encoders(vae_identity="vae", text_identity="clip")
        fill(data.latents_requests(), encoders.latents, batch_size=2, shard=(index, 3))
        fill(data.text_requests(), encoders.text, batch_size=2, shard=(index, 3))
    assert encoders.images == 8
    assert len(encoders.prompts) == 8
    assert len(taken(parts[2], 9)) == 9


@pytest.mark.parametrize("stage", ["latents", "text"])
@pytest.mark.parametrize("point", ["file.created", "file.written", "file.before_rename"])
@pytest.mark.reliability_row(5)
def test_a_full_disk_while_caching_leaves_only_whole_entries(
    make: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, point: str
) -> None:
    monkeypatch.setattr(store, "MAX_SHARD_ENTRIES", 1)
    data = make(photos)
    writes = 0

    def fill_disk(name: str) -> None:
        nonlocal writes
        writes += name == point
        if writes > 3:
            raise OSError(errno.ENOSPC, "no space left")

    encoders = Encoders()
    data.set_encoders(vae_identity="vae", text_identity="clip")
    caching = {
        "latents": lambda: fill(data.latents_requests(), encoders.latents, batch_size=2),
        "text": lambda: fill(data.text_requests(), encoders.text, batch_size=2),
    }
    with at_crash_points(fill_disk), pytest.raises(StorageError):
        caching[stage]()
    assert not list((tmp_path / "cache").rglob(".partial*"))
    again = Encoders()
    cached(make(photos), again)
    assert (again.images, len(again.prompts)) == ((5, 8) if stage == "latents" else (8, 5))


@pytest.mark.reliability_row(26)
def test_a_read_only_dataset_is_never_written_to(make: Make, photos: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (photos, *photos.iterdir())}
    photos.chmod(0o500)
    try:
        taken(cached(make(photos)), 4)
    finally:
        photos.chmod(0o700)
    assert {file: file.stat().st_mtime_ns for file in (photos, *photos.iterdir())} == before


@pytest.mark.parametrize("kind", ["vae", "text"])
@pytest.mark.reliability_row(26)
def test_a_cache_inside_the_images_folder_is_refused(photos: Path, tmp_path: Path, kind: str) -> None:
    folders = {"vae": tmp_path / "cache", "text": tmp_path / "cache"} | {kind: photos / "cache"}
    config = DatasetConfig(id="photos", instance_data_dir=photos, resolution=64)
    data = DataConfig(cache_dir_vae=folders["vae"], cache_dir_text=folders["text"])
    with pytest.raises(DataError, match=r"photos/cache.*instance_data_dir of dataset 'photos'"):
        TrainingData([config], data, seed=0, batch_size=1, pixel_alignment=64)
    assert not (photos / "cache").exists()


@pytest.mark.reliability_row(20)
def test_any_file_name_trains_and_is_shown_on_one_line(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = [
        "🐈.png",
        "a\u0301.png",
        "\u202eright.png",
        "-dash.png",
        "new\nline.png",
        os.fsdecode(b"\xff.png"),
    ]
    for name in names:
        file = tmp_path / "photos" / name
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as opened:
            Image.new("RGB", (64, 64), (names.index(name) * 40, 0, 0)).save(opened, "PNG")
    data = cached(make(tmp_path / "photos", caption_strategy="instanceprompt", instance_prompt="a cat"))
    assert len(data.samples) == 6
    assert all(sample.path.isprintable() for sample in data.samples)
    assert len({sample.path for batch in taken(data, 3) for sample in batch.samples}) == 6
    shuffle = {"enable": True, "split_on": "space"}
    prompt = {"caption_strategy": "instanceprompt", "instance_prompt": "a cat"}
    shuffled = make(tmp_path / "photos", **prompt, caption_shuffle=shuffle)
    assert set(shuffled.captions()) == {"a cat", "cat a"}
    named = make(tmp_path / "photos", caption_strategy="filename")
    assert [each.reason for each in named.skipped] == ["its name is its caption and is not UTF-8; rename it"]


def test_max_num_samples_takes_a_random_part_by_the_seed(make: Make, photos: Path) -> None:
    def paths(seed: int) -> list[str]:
        return [sample.path for sample in make(photos, max_num_samples=3, seed=seed).samples]

    assert len(paths(0)) == 3
    assert paths(0) == paths(0)
    assert len({tuple(paths(seed)) for seed in range(10)}) > 1
    assert len(make(photos, max_num_samples=100).samples) == 8


@pytest.mark.parametrize(
    ("options", "target", "resized", "top_left"),
    [
        ({}, Size(64, 128), Size(64, 128), (0, 0)),
        ({"crop": True, "crop_style": "center"}, Size(64, 64), Size(64, 128), (0, 32)),
        ({"crop": True, "crop_style": "corner"}, Size(64, 64), Size(64, 128), (0, 0)),
        ({"crop": True, "crop_aspect": "preserve"}, Size(64, 128), Size(64, 128), (0, 0)),
        ({"resolution": 128}, Size(128, 256), Size(128, 256), (0, 0)),
        ({"resolution": 0.016384, "resolution_type": "area"}, Size(64, 192), Size(96, 192), (16, 0)),
    ],
)
def test_samples_say_how_their_image_was_resized_and_cut(
    make: Make,
    tmp_path: Path,
    options: dict[str, object],
    target: Size,
    resized: Size,
    top_left: tuple[int, int],
) -> None:
    paint(tmp_path / "photos", "wide.png", (400, 200))
    (sample,) = make(tmp_path / "photos", **{"resolution_type": "pixel", **options}).samples
    assert sample.original_px == Size(height=200, width=400)
    assert (sample.target_px, sample.resized_px, sample.crop_top_left) == (target, resized, top_left)


def test_a_crop_with_random_place_is_the_same_in_every_run_of_a_seed(make: Make, tmp_path: Path) -> None:
    for number in range(6):
        paint(tmp_path / "photos", f"{number}.png", (1000, 64))

    def places(seed: int) -> list[tuple[int, int]]:
        return [s.crop_top_left for s in make(tmp_path / "photos", crop=True, seed=seed).samples]

    assert places(1) == places(1)
    assert places(1) != places(2)
    assert len(set(places(1))) > 3


def test_load_pixels_follows_the_plan(make: Make, tmp_path: Path) -> None:
    image = Image.new("RGB", (128, 64), "black")
    image.paste("white", (64, 0, 128, 64))
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "half.png")
    data = make(tmp_path / "photos", crop=True, crop_style="corner")
    pixels = load_pixels(data.divided.trained[0].images[0])
    assert pixels.shape == (3, 64, 64)
    assert pixels.max() == -1.0


DOWNSAMPLING = {
    "crop": True,
    "crop_style": "center",
    "maximum_image_size": 100,
    "target_downsample_size": 128,
}


def test_pixels_of_an_image_above_the_maximum_are_cut_out_of_the_target(make: Make, tmp_path: Path) -> None:
    # 256 px become 128, of which the middle 64 are used: the half that is white.
    image = Image.new("RGB", (256, 256), "black")
    image.paste("white", (64, 64, 192, 192))
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "frame.png")
    whole = load_pixels(make(tmp_path / "photos", crop=True).divided.trained[0].images[0])
    part = load_pixels(make(tmp_path / "photos", **DOWNSAMPLING).divided.trained[0].images[0])
    assert whole.shape == part.shape == (3, 64, 64)
    assert whole[:, :10, :10].max() < -0.9
    assert part[:, 3:-3, 3:-3].min() > 0.99


def test_a_maximum_changes_the_cache_keys_of_the_images_above_it_alone(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paint(tmp_path / "photos", "large.png", (256, 256))
    paint(tmp_path / "photos", "small.png", (90, 90))

    def keys(**options: object) -> list[str]:
        data = make(tmp_path / "photos", **{"crop": True, "crop_style": "center", **options})
        data.set_encoders(vae_identity="vae", text_identity="clip")
        return [request.key for request in data.latents_requests()]

    before = keys()
    for without_effect in (
        {"maximum_image_size": 100},
        {"target_downsample_size": 128},
        {"maximum_image_size": 100, "target_downsample_size": 64},
        {"maximum_image_size": 300, "target_downsample_size": 128},
        {"max_upscale_threshold": 0.5},
    ):
        assert keys(**without_effect) == before, without_effect
    caplog.clear()
    now = keys(**DOWNSAMPLING)
    assert (now[0] != before[0], now[1] == before[1]) == (True, True)
    counts = [each.args for each in caplog.records if "maximum_image_size" in each.getMessage()]
    assert counts == [("photos", 1, "2 images are", 100.0, 128.0)]


def test_an_image_that_every_bucket_enlarges_too_much_is_skipped(make: Make, tmp_path: Path) -> None:
    paint(tmp_path / "photos", "large.png", (128, 64))
    paint(tmp_path / "photos", "small.png", (32, 32))
    keys = {
        "crop": True,
        "crop_aspect": "random",
        "crop_aspect_buckets": [1.0, 2.0],
        "resolution_type": "pixel",
    }
    data = make(tmp_path / "photos", **keys, max_upscale_threshold=0.5, batch_size=1)
    assert [sample.path for sample in data.samples] == ["large.png"]
    assert [each.path for each in data.skipped] == ["small.png"]
    assert "max_upscale_threshold" in data.skipped[0].reason
    assert len(make(tmp_path / "photos", **keys, batch_size=1).samples) == 2


def test_random_shapes_are_the_same_in_every_run_and_go_into_buckets(make: Make, tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / "photos", f"{number:02}.png", (200, 200))
    buckets = [{"aspect": 0.5, "weight": 0.5}, {"aspect": 2, "weight": 0.5}]

    def sizes(seed: int) -> list[Size]:
        data = make(
            tmp_path / "photos",
            crop=True,
            crop_aspect="random",
            crop_aspect_buckets=buckets,
            resolution_type="pixel",
            seed=seed,
        )
        return [sample.target_px for sample in data.samples]

    assert set(sizes(1)) == {Size(64, 128), Size(128, 64)}
    assert sizes(1) == sizes(1)
    assert sizes(1) != sizes(2)
    data = cached(make(tmp_path / "photos", crop=True, crop_aspect="random", crop_aspect_buckets=buckets))
    for batch in taken(data, 4):
        (size,) = {sample.target_px for sample in batch.samples}
        assert batch.latents.shape[2:] == (size.height // 8, size.width // 8)


def test_facts_change_with_the_images_the_captions_and_the_global_batch_alone(
    make: Make, photos: Path
) -> None:
    def changed() -> set[str]:
        now = make(photos).facts()
        return {key.removeprefix("dataset photos, ") for key in now if now[key] != before[key]}

    before = make(photos).facts()
    assert before["dataset photos, number of images"] == 8
    (photos / "7.png").rename(photos / "seven.png")
    (photos / "7.txt").rename(photos / "seven.txt")
    assert changed() == set(), "a name is no content"
    (photos / "0.png").rename(photos / "zero.png")
    (photos / "0.txt").rename(photos / "zero.txt")
    assert changed() == {"hash of all captions"}, "they are compared in the order of the names"
    (photos / "zero.png").rename(photos / "0.png")
    (photos / "zero.txt").rename(photos / "0.txt")
    (photos / "1.txt").write_text("another")
    assert changed() == {"hash of all captions"}
    (photos / "1.txt").write_text("photo x")
    shutil.copy(photos / "3.png", photos / "2.png")
    assert changed() == {"hash of all images"}
    (photos / "2.png").unlink()
    assert changed() == {"number of images", "hash of all images", "hash of all captions"}
    two = make(photos, num_processes=2).facts()
    assert {key for key in two if two[key] != make(photos).facts()[key]} == {
        "samples per batch of all processes"
    }


def test_batches_of_a_slider_have_their_dataset_s_strength_and_neutral_ones_each_of_them(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strengths = {"more": 0.5, "less": -0.25, "plain": None}
    for name in strengths:
        for number in range(4):
            paint(tmp_path / name, f"{number}.png", caption="a")

    def made(**options: object) -> TrainingData:
        data = make(*(tmp_path / name for name in strengths), **options)
        data.datasets = [
            each.model_copy(update={"slider_strength": strengths[each.id]}) for each in data.datasets
        ]
        data.__post_init__()
        return data

    data = cached(made())
    drawn = [(batch.samples[0].dataset_id, batch.strength) for batch in islice(data.batches(), 12)]
    assert [name for name, _ in drawn] == ["more", "less", "plain"] * 4
    assert {each for each in drawn if each[0] != "plain"} == {("more", 0.5), ("less", -0.25)}
    assert Counter(strength for name, strength in drawn if name == "plain") == {0.5: 2, -0.25: 2}
    later = [(batch.samples[0].dataset_id, batch.strength) for batch in islice(data.batches(start=5), 7)]
    assert later == drawn[5:]
    for rank in range(2):
        part = cached(made(batch_size=1, num_processes=2, process_index=rank))
        assert [batch.strength for batch in islice(part.batches(), 12)] == [each for _, each in drawn]
    assert "4 at slider_strength -0.25, 4 at slider_strength 0.5" in caplog.text


def test_every_variant_of_a_neutral_caption_is_trained_at_every_strength(make: Make, tmp_path: Path) -> None:
    strengths = {"more": 1.0, "less": -1.0, "plain": None}
    for name in strengths:
        paint(tmp_path / name, "0.png", caption="a, b, c, d, e")
    # One batch is one pass over the images, so batches take turns as the variants do.
    data = make(*(tmp_path / name for name in strengths), batch_size=1, caption_shuffle={"enable": True})
    data.datasets = [
        each.model_copy(update={"slider_strength": strengths[each.id]}) for each in data.datasets
    ]
    data.__post_init__()
    neutral = [each for each in taken(cached(data), 96) if each.samples[0].dataset_id == "plain"]
    assert Counter(each.strength for each in neutral) == {1.0: 16, -1.0: 16}
    drawn = Counter((each.samples[0].caption, each.strength) for each in neutral)
    assert len(drawn) == 4, "two variants at two strengths"
    assert min(drawn.values()) > 2


def test_directions_of_a_slider_are_compared_in_the_whole_batches_of_each_size(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        paint(tmp_path / "more", f"{number}.png", caption="a")
        paint(tmp_path / "less", f"{number}.png", (64, 64 if number else 128), caption="a")
    data = make(tmp_path / "more", tmp_path / "less", aspect_bucket_alignment=8)
    data.datasets = [
        each.model_copy(update={"slider_strength": strength})
        for each, strength in zip(data.datasets, (1.0, -1.0), strict=True)
    ]
    data.__post_init__()
    strengths = Counter(batch.strength for batch in islice(cached(data).batches(), data.batches_per_epoch))
    assert strengths == {1.0: 2, -1.0: 3}
    assert "6 at slider_strength -1, 4 at slider_strength 1" in caplog.text


def test_batches_without_a_slider_have_full_strength(make: Make, photos: Path) -> None:
    assert {batch.strength for batch in islice(cached(make(photos)).batches(), 4)} == {1.0}


SHUFFLED = {
    "caption_shuffle": {"enable": True, "count": 3, "position_start": 1},
    "caption_tag_dropout_rate": 0.3,
}


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    for number in range(6):
        tags = ", ".join(f"tag{number}{letter}" for letter in "abcde")
        paint(tmp_path / "tagged", f"{number}.png", caption=f"sks, {tags}")
    return tmp_path / "tagged"


@pytest.mark.reliability_row(4)
def test_variants_of_captions_are_encoded_before_training_and_taken_in_turn(make: Make, tagged: Path) -> None:
    encoders = Encoders()
    data = cached(make(tagged, **SHUFFLED, repeats=1), encoders)
    assert set(encoders.prompts) == set(data.captions())
    seen: dict[str, list[str]] = {}
    for batch in taken(data, 4 * data.batches_per_epoch):
        for sample in batch.samples:
            seen.setdefault(sample.path, []).append(sample.caption)
    assert {len(captions) for captions in seen.values()} == {8}, "an image is taken twice an epoch"
    for captions in seen.values():
        # Two epochs are four passes; an epoch shuffles its batches.
        assert sorted(captions[:4]) == sorted(captions[4:]), "after caption_variants the first comes again"
        assert len(set(captions)) > 2
        assert all(caption.startswith("sks") for caption in captions)
        assert set(captions) <= set(encoders.prompts)


@pytest.mark.reliability_row(8)
@pytest.mark.parametrize("start", [0, 7])
def test_variants_are_the_same_on_two_processes_and_from_any_start(
    make: Make, tagged: Path, start: int
) -> None:
    paint(tagged, "wide.png", (128, 64), caption="sks, wide, image, of, many, tags")
    own = {**SHUFFLED, "caption_dropout": 0.2}
    whole = taken(cached(make(tagged, batch_size=4, **own)), 20)[start:]
    halves = [
        taken(
            cached(make(tagged, batch_size=2, num_processes=2, process_index=index, **own)),
            20 - start,
            start=start,
        )
        for index in (0, 1)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch.samples == first.samples + second.samples


def test_a_datasets_own_caption_dropout_needs_the_empty_caption(make: Make, photos: Path) -> None:
    assert make(photos).captions()[0] != ""
    data = cached(make(photos, caption_dropout_probability=1.0))
    assert data.captions()[0] == ""
    assert {sample.caption for batch in taken(data, 4) for sample in batch.samples} == {""}
    own = cached(make(photos, caption_dropout=1.0, caption_dropout_probability=0))
    assert own.captions()[0] != ""
    assert all(sample.caption for batch in taken(own, 4) for sample in batch.samples)


def test_the_facts_of_a_run_change_with_its_variants_and_else_not(make: Make, tagged: Path) -> None:
    plain, varied = make(tagged).facts(), make(tagged, **SHUFFLED).facts()
    assert plain == make(tagged).facts()
    assert {key for key in plain if plain[key] != varied[key]} == {"dataset tagged, hash of all captions"}


def test_captions_without_tags_to_shuffle_are_refused_or_warned_of(
    make: Make, photos: Path, tagged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shuffle = {"enable": True}
    with pytest.raises(DataError, match=r"'photos'.*split_on.*8 of 8.*0\.png"):
        make(photos, caption_shuffle=shuffle)
    paint(tagged, "plain.png", caption="a photo")
    make(tagged, caption_shuffle=shuffle)
    assert re.search(r"tagged.*split_on.*1 of 7.*plain\.png", caplog.text)


@pytest.mark.parametrize("datasets", [1, 2])
def test_more_variants_than_the_limit_are_refused_before_they_are_made(
    make: Make, tagged: Path, monkeypatch: pytest.MonkeyPatch, datasets: int
) -> None:
    # Below the images of one dataset, or above the 14 variants of each of two.
    limit = {1: 6, 2: 20}[datasets]
    monkeypatch.setattr("simpletuner.helpers.data.caption_variants.MAX_VARIANTS", limit)
    folders = [tagged, tagged.parent / "more"][:datasets]
    for folder in folders:
        for number in range(7):
            paint(folder, f"{number}.png", caption="a, b")
    assert len(make(*folders).samples) == 7 * datasets, "without variants there is no limit"
    if datasets == 1:
        monkeypatch.delattr("simpletuner.helpers.data.caption_variants.CaptionPlan.variants")
    with pytest.raises(DataError, match=rf"{14 if datasets == 1 else 28} .*ondemand.*caption_variants"):
        make(*folders, caption_shuffle={"enable": True})


def test_an_image_without_a_caption_is_trained_with_the_prefix(
    make: Make, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paint(photos, "bare.png")
    data = make(photos, caption_prefix="sks", caption_suffix="end")
    assert next(each.caption for each in data.samples if each.path == "bare.png") == "sks end"
    assert re.search(r"1 caption is missing: bare.*with caption_prefix and caption_suffix alone", caplog.text)


def test_datasets_follow_each_other_and_a_step_without_one_is_refused(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paint(tmp_path / "later", "one.png")
    small = DatasetConfig(id="photos", instance_data_dir=photos, resolution=64, end_step=3)
    large = DatasetConfig(id="later", instance_data_dir=tmp_path / "later", resolution=64, start_step=3)
    folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")

    def made(*datasets: DatasetConfig, **options: object) -> TrainingData:
        training = TrainingConfig(max_train_steps=4, gradient_accumulation_steps=2)
        options = {"seed": 1, "batch_size": 1, "pixel_alignment": 64, "training": training} | options
        return TrainingData(datasets, folders, **options)

    with caplog.at_level(logging.INFO):
        data = made(small, large)
    assert "Datasets from step 3: photos, later; epochs of 9 batches of 1 image." in caplog.text
    whole = taken(cached(data), 8)
    assert [batch.samples[0].dataset_id for batch in whole[:4]] == ["photos"] * 4
    assert {batch.samples[0].dataset_id for batch in whole[6:]} == {"later"}
    assert shape(taken(data, 3, start=5)) == shape(whole[5:])
    assert data.counts_steps
    assert not made(large.model_copy(update={"start_step": 1})).counts_steps
    with pytest.raises(DataError, match="No dataset takes part in step 4"):
        made(small)


def test_a_dataset_has_its_own_batch_size_on_any_number_of_processes(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        paint(tmp_path / "large", f"{number}.png", (128, 128))
    many = DatasetConfig(id="photos", instance_data_dir=photos, resolution=64, train_batch_size=4)
    few = DatasetConfig(id="large", instance_data_dir=tmp_path / "large", resolution=128)
    folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")

    def made(divisor: int, process_index: int = 0) -> TrainingData:
        datasets = [
            few,
            many.model_copy(update={"train_batch_size": 4 // divisor}),
        ]
        options = {"num_processes": divisor, "process_index": process_index, "batch_size": 2 // divisor}
        return cached(TrainingData(datasets, folders, seed=1, pixel_alignment=64, **options))

    with caplog.at_level(logging.INFO):
        whole = taken(made(1), 8)
    assert "Epoch: 4 batches of 2 to 4 images." in caplog.text
    caplog.clear()
    training = TrainingConfig(max_train_steps=8)
    late = [few, many.model_copy(update={"start_step": 4})]
    with caplog.at_level(logging.INFO):
        TrainingData(late, folders, seed=1, pixel_alignment=64, batch_size=2, training=training)
    lines = [each for each in caplog.messages if "batches" in each]
    assert lines == [
        "Datasets from step 1: large; epochs of 2 batches of 2 images.",
        "Datasets from step 4: large, photos; epochs of 4 batches of 2 to 4 images.",
    ]
    sizes = {batch.samples[0].dataset_id: len(batch) for batch in whole}
    assert sizes == {"photos": 4, "large": 2}
    assert [index for batch in whole for index in batch.sample_indices] == list(range(24))
    halves = [taken(made(2, process), 8) for process in (0, 1)]
    joined = [
        tuple(a + b for a, b in zip(first, second, strict=True))
        for first, second in zip(*map(shape, halves), strict=True)
    ]
    assert joined == shape(whole)
    data = made(1)
    assert data.batches_before(12) == 4
    assert "dataset photos, samples per batch" in data.facts()
    assert "dataset large, samples per batch" not in data.facts()

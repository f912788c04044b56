"""What a start takes from the index of the one before, and what it does not."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data import index as index_module
from simpletuner.helpers.data.buckets import placement_of
from simpletuner.helpers.data.columns import Texts
from simpletuner.helpers.data.cropping import Cropping
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.index import ImageIndex, index_file
from simpletuner.helpers.data.sources.base import FoundFile, packed_signature, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import DataError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images with captions; files that changed just now are trusted."""
    monkeypatch.setattr(index_module, "_RACY_NS", -1 << 62)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"photo {number}")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened."""
    names: list[str] = []
    original = LocalFolder.read

    def read(self: LocalFolder, file: FoundFile, *, limit: int) -> bytes:
        names.append(file.name)
        return original(self, file, limit=limit)

    monkeypatch.setattr(LocalFolder, "read", read)
    return names


def start(folder: Path, **options: Any) -> TrainingData:
    config = DatasetConfig(id="photos", instance_data_dir=folder, resolution=64, **options)
    cache = folder.parent / "cache"
    data = DataConfig(cache_dir_vae=cache / "vae", cache_dir_text=cache / "text")
    return TrainingData([config], data, seed=1, batch_size=2, pixel_alignment=64)


def test_a_second_start_opens_no_image_and_no_caption(photos: Path, opened: list[str]) -> None:
    first = start(photos)
    assert sorted(opened) == sorted(f"{number}.{suffix}" for number in range(4) for suffix in ("png", "txt"))
    opened.clear()
    second = start(photos)
    assert opened == []
    assert (second.samples, second.captions(), second.facts()) == (
        first.samples,
        first.captions(),
        first.facts(),
    )


def test_the_index_of_a_run_with_the_cache_of_latents_off_lies_with_the_run(
    photos: Path, opened: list[str]
) -> None:
    config = DatasetConfig(id="photos", instance_data_dir=photos, resolution=64)
    cache, own = photos.parent / "cache", photos.parent / "out" / "indexes"
    data = DataConfig(cache_dir_vae=cache / "vae", cache_dir_text=cache / "text", vae_cache_disable=True)
    for num_opened in (8, 0):
        opened.clear()
        TrainingData([config], data, seed=1, batch_size=2, pixel_alignment=64, index_folder=own)
        assert len(opened) == num_opened
    assert not cache.exists()


@pytest.mark.reliability_row(17)
@pytest.mark.parametrize("sets_back", [False, True])
def test_a_caption_that_changed_is_read_again_and_no_other_file(
    photos: Path, opened: list[str], sets_back: bool
) -> None:
    start(photos)
    before = (photos / "2.txt").stat()
    time.sleep(0.02)  # the clock of a file system is coarse
    (photos / "2.txt").write_text("other 2")
    if sets_back:
        os.utime(photos / "2.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    opened.clear()
    assert start(photos).captions() == ("photo 0", "photo 1", "other 2", "photo 3")
    assert opened == ["2.txt"]
    opened.clear()
    assert start(photos).captions()[2] == "other 2"
    assert opened == []


def test_files_that_come_and_go_leave_the_others_known(photos: Path, opened: list[str]) -> None:
    start(photos)
    (photos / "1.png").unlink()
    (photos / "1.txt").unlink()
    (photos / "in").mkdir()
    Image.new("RGB", (64, 64), "blue").save(photos / "in" / "0.png")
    (photos / "in" / "0.txt").write_text("blue")
    opened.clear()
    data = start(photos)
    assert data.captions() == ("photo 0", "photo 2", "photo 3", "blue")
    assert sorted(opened) == ["in/0.png", "in/0.txt"]
    assert [sample.path for sample in data.samples] == ["0.png", "2.png", "3.png", "in/0.png"]


def test_known_captions_are_parted_by_the_settings_of_this_start(photos: Path) -> None:
    (photos / "0.txt").write_text("one\r\n\r\n two \none")
    assert start(photos).captions()[:2] == ("one", "two")
    assert start(photos, caption_lines="first").captions()[:2] == ("one", "photo 1")
    assert start(photos, caption_lines="whole").captions()[0] == "one\n\n two \none"


def test_two_text_files_of_an_image_are_known_too(photos: Path, opened: list[str]) -> None:
    (photos / "0.png.txt").write_text("photo 0")
    start(photos)
    opened.clear()
    assert start(photos).captions()[0] == "photo 0"
    assert opened == []
    (photos / "0.png.txt").write_text("another")
    with pytest.raises(DataError, match=r"0\.txt and 0\.png\.txt hold different captions of 0\.png"):
        start(photos)


@pytest.mark.reliability_row(15)
def test_a_caption_that_cannot_be_read_is_an_error_each_time(photos: Path) -> None:
    (photos / "3.txt").write_bytes(b"\xff")
    (photos / "1.txt").write_bytes(b"a\0")
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 captions cannot be used: .*1\.txt: it holds a NUL.*3\.txt"):
            start(photos)


@pytest.mark.reliability_row(17)
def test_a_caption_that_changed_just_now_is_not_trusted(
    photos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_RACY_NS", 1 << 62)
    start(photos)
    opened.clear()
    start(photos)
    assert sorted(opened) == sorted(f"{number}.{suffix}" for number in range(4) for suffix in ("png", "txt"))


@pytest.mark.reliability_row(18)
@pytest.mark.parametrize("place", [0, 8, -1, -2], ids=["length", "header", "end of a text", "text"])
def test_an_index_with_a_changed_byte_is_made_again(photos: Path, opened: list[str], place: int) -> None:
    first = start(photos)
    (file,) = (photos.parent / "cache").rglob("images_*")
    data = bytearray(file.read_bytes())
    data[place] ^= 0x55
    file.write_bytes(data)
    opened.clear()
    assert start(photos).facts() == first.facts()
    assert len(opened) == 8
    opened.clear()
    start(photos)
    assert opened == []


@pytest.mark.reliability_row(18)
def test_a_cut_index_is_made_again(photos: Path, opened: list[str]) -> None:
    first = start(photos)
    (file,) = (photos.parent / "cache").rglob("images_*")
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        opened.clear()
        assert start(photos).facts() == first.facts()
        assert len(opened) == 8


def test_a_caption_with_a_secret_is_not_written_down(photos: Path, opened: list[str]) -> None:
    secret = "me:openly"
    (photos / "2.txt").write_text(f"a board that says ftp://{secret}@example.org")
    start(photos)
    (file,) = (photos.parent / "cache").rglob("images_*")
    assert secret.encode() not in file.read_bytes()
    opened.clear()
    assert secret in start(photos).captions()[2]
    assert opened == ["2.txt"]


def test_signatures_that_are_no_numbers_are_given_back(photos: Path) -> None:
    class Tagged(LocalFolder):
        def stat(self, name: str, entry: os.DirEntry[str]) -> FoundFile | str:
            found = super().stat(name, entry)
            assert isinstance(found, FoundFile)
            return FoundFile(self, name, () if name == "1.png" else ("etag", name))

    files = scan_source(Tagged(photos)).images
    expected = [("etag", "0.png"), (), ("etag", "2.png"), ("etag", "3.png")]
    assert [file.signature for file in files] == expected
    assert [file.signature for file in files.take(np.array([2, 1]))] == [("etag", "2.png"), ()]
    assert files[-1].signature == ("etag", "3.png")


def test_damaged_images_stay_known_beside_new_ones(photos: Path, opened: list[str]) -> None:
    data = start(photos)
    (digest,) = {image.digest for image in data.divided.trained[0].images if image.sample.path == "1.png"}
    data.leave_out({digest: "it is cut"})
    assert [sample.path for sample in data.samples] == ["0.png", "2.png", "3.png"]
    opened.clear()
    again = start(photos)
    assert opened == []
    assert [(each.path, each.reason) for each in again.skipped] == [("1.png", "it is cut")]
    assert again.samples == data.samples
    Image.new("RGB", (64, 64), "blue").save(photos / "4.png")
    assert len(start(photos).skipped) == 1


def test_an_index_holds_nothing_in_memory_after_it_was_saved(photos: Path) -> None:
    config = DatasetConfig(id="photos", instance_data_dir=photos)
    index = ImageIndex(index_file(photos.parent, config))
    index.infos(scan_source(LocalFolder(photos)).images)
    index.save()
    assert "_known" not in vars(index)
    assert all(map(index.knows, scan_source(LocalFolder(photos)).images))


def test_signatures_of_any_form_are_compared() -> None:
    packed = {packed_signature(each) for each in ((1, 2, 3, 4), (1, 2, 3, 5), ("a",), ("b",), (1 << 70,), ())}
    assert len(packed) == 6
    assert {len(each) for each in packed} == {32}
    assert packed_signature(("etag", 5)) == packed_signature(("etag", 5))


CROPS: list[dict[str, object]] = [
    {},
    {"crop": True, "crop_style": "random"},
    {"crop": True, "crop_style": "center", "minimum_image_size": 200},
    {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0]},
    {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [0.5, 1.0, 2.0], "crop_style": "corner"},
    {"maximum_image_size": 600, "target_downsample_size": 300},
]


@pytest.mark.parametrize("options", CROPS, ids=[str(number) for number in range(len(CROPS))])
def test_many_placements_are_those_of_one_image_each(tmp_path: Path, options: dict[str, Any]) -> None:
    keys = {"resolution": 256, "resolution_type": "pixel", **options}
    config = DatasetConfig(id="p", instance_data_dir=tmp_path, **keys)
    cropping = Cropping(config=config, seed=3, alignment=16, aspect_decimals=2)
    rng = Random(5)
    sizes = [(rng.randint(100, 900), rng.choice([128, 300, rng.randint(100, 900)])) for _ in range(300)]
    sizes += sizes[:50]
    names = [f"{number}.png" for number in range(len(sizes))]
    cuts, problems = cropping.placements(np.array(sizes, np.int32), Texts.of(names))
    for row, ((height, width), name) in enumerate(zip(sizes, names, strict=True)):
        one = cropping.placement(Size(height, width), name=name)
        assert (problems.get(row) or placement_of(cuts[row].tolist())) == one
    assert bool(problems) == ("minimum_image_size" in options)

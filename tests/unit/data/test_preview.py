"""What a dataset will give to training, from headers alone and within limits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data import preview as module
from simpletuner.helpers.data.index import ImageIndex, index_file
from simpletuner.helpers.data.preview import DatasetPreview, preview
from simpletuner.helpers.data.sources.base import scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them small, and one damaged."""
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("a", (640, 320)), ("b", (64, 64)), ("c", (320, 640))):
        Image.new("RGB", size).save(images / f"{name}.png")
    (images / "a.txt").write_text("a wide one")
    (images / "d.png").write_bytes(b"no image")
    return images


def look(folder: Path, *, reads_all: bool = False, **keys: Any) -> DatasetPreview:
    config = DatasetConfig(id="x", instance_data_dir=folder, resolution=256.0, **keys)
    data = DataConfig(cache_dir_vae=folder.parent / "cache")
    return preview(config, data, alignment=64, seed=1, reads_all=reads_all)


def test_images_buckets_enlargement_captions_and_damage_are_counted(folder: Path) -> None:
    found = look(folder)
    assert (found.num_images, found.num_read, found.is_whole) == (4, 4, True)
    assert found.buckets == {Size(192, 384): 1, Size(256, 256): 1, Size(384, 192): 1}
    assert found.enlarged == ("b.png",)
    assert [problem.partition(":")[0] for problem in found.problems] == ["d.png"]
    assert found.num_uncaptioned == 2
    assert found.example == ("a.png", "a wide one")
    assert "textfile" in found.captions
    assert "not set" in found.captions
    assert not (folder.parent / "cache").exists(), "a preview writes nothing"


def test_images_above_the_maximum_and_images_without_a_bucket_are_counted(folder: Path) -> None:
    keys = {"crop": True, "maximum_image_size": 300, "target_downsample_size": 280}
    assert look(folder, **keys).num_downsampled == 2
    assert look(folder).num_downsampled == 0
    buckets = {"crop_aspect": "closest", "crop_aspect_buckets": [0.5, 1, 2], "max_upscale_threshold": 0}
    found = look(folder, crop=True, **buckets)
    assert found.buckets == {Size(192, 384): 1, Size(384, 192): 1}
    assert [problem.partition(":")[0] for problem in found.problems] == ["b.png", "d.png"]
    small = look(folder, minimum_image_size=100)
    assert [problem.partition(":")[0] for problem in small.problems] == ["b.png", "d.png"]


def test_a_given_source_of_captions_is_named_alone(folder: Path) -> None:
    found = look(folder, caption_strategy="filename")
    assert found.captions == "filename"
    assert found.num_uncaptioned == 0


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ({}, "textfile"),
        ({"caption_strategy": "filename"}, "filename"),
        ({"caption_strategy": "metadata"}, ""),
    ],
    ids=["not set", "file names", "metadata"],
)
def test_a_table_of_captions_that_is_not_read_is_a_problem(
    folder: Path, keys: dict[str, str], source: str
) -> None:
    rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in "abcd"]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    found = [each for each in look(folder, **keys).problems if each.startswith("metadata.jsonl")]
    assert bool(found) is bool(source)
    assert all(f"not read, as captions come from {source}." in each for each in found)


def test_an_image_whose_caption_cannot_be_used_is_a_problem_and_in_no_bucket(folder: Path) -> None:
    (folder / "a.png").rename(folder / os.fsdecode(b"\xff.png"))
    found = look(folder, caption_strategy="filename")
    assert [problem.partition(":")[0] for problem in found.problems] == ["d.png", r"\udcff.png"]
    assert found.buckets == {Size(256, 256): 1, Size(384, 192): 1}


def test_a_text_file_that_two_images_could_claim_is_a_problem(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "a.webp")
    (problem,) = [each for each in look(folder).problems if "a.txt" in each]
    assert "a.png or a.webp" in problem


def test_one_pixel_less_than_the_bucket_in_one_direction_is_an_enlargement(folder: Path) -> None:
    Image.new("RGB", (447, 128)).save(folder / "e.png")
    found = look(folder)
    assert found.buckets[Size(128, 448)] == 1
    assert found.enlarged == ("b.png", "e.png")


def test_only_some_headers_are_read_unless_all_are_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_HEADERS", 2)
    assert (look(folder).num_read, look(folder).is_whole) == (2, False)
    assert look(folder, reads_all=True).is_whole


def test_the_time_is_bounded_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_S", -1.0)
    assert look(folder).num_read == 0


def test_images_in_the_index_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.index._RACY_NS", -1)
    config = DatasetConfig(id="x", instance_data_dir=folder, resolution=256.0)
    index = ImageIndex(index_file(folder.parent / "cache" / "x", config))
    for file in scan_source(LocalFolder(folder)).images:
        index.info(file)
    index.save()
    monkeypatch.setattr(module, "MOST_HEADERS", 0)
    assert look(folder).is_whole


def test_max_num_samples_bounds_the_images(folder: Path) -> None:
    assert look(folder, max_num_samples=2).num_images == 2


def test_captions_are_shown_as_the_run_changes_them_and_their_variants_counted(folder: Path) -> None:
    (folder / "b.txt").write_text("a small one\nanother")
    keys = {"caption_filter_list": ["s/wide/{big|big}/"], "caption_prefix": "sks", "enable_wildcard": True}
    found = look(folder, **keys)
    assert found.example == ("a.png", "sks a big one")
    assert (found.num_variants, found.num_captions, found.expected_captions) == (4, 16, 16)
    assert look(folder).num_variants == 1
    both = look(folder, prepend_instance_prompt=True, instance_prompt="photo:")
    assert both.example == ("a.png", "photo: a wide one")


def test_captions_of_unread_images_are_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HEADERS", 2)
    found = look(folder, enable_wildcard=True)
    assert (found.num_read, found.num_images, found.num_captions) == (2, 4, 8)
    assert found.expected_captions == 16


def test_a_table_of_which_no_row_is_an_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,caption\na.png,a\n")
    config = DatasetConfig(
        id="a", type="table", table_file=tmp_path / "list.csv", instance_data_dir=tmp_path, resolution=64
    )
    data = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
    with pytest.raises(DataError, match=r"list.csv holds no image \(a.png: no such file"):
        preview(config, data, alignment=64, seed=1, reads_all=True)

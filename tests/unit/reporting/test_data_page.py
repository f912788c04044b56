"""The measures behind `simpletuner data look`, with numbers computed by hand where there are any."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.caption_variants import caption_plan
from simpletuner.helpers.data.index import ImageIndex
from simpletuner.helpers.data.planning import DatasetPlan, plan_dataset
from simpletuner.helpers.reporting.data_page import duplicates
from simpletuner.helpers.reporting.data_page.duplicates import MOST_BITS, Nearest, groups, nearest
from simpletuner.helpers.reporting.data_page.measures import laplacian_variance, perceptual_hash
from simpletuner.helpers.reporting.data_page.texts import count_texts, holds, is_uncaptioned, texts_of
from tests.integration.data_folders import save, scene
from tests.unit.data.image_samples import photograph


def bits_apart(first: Image.Image, second: Image.Image) -> int:
    one, other = perceptual_hash(first), perceptual_hash(second)
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_copies_at_another_size_or_quality_have_nearly_the_same_hash() -> None:
    image = photograph(600, 400)
    for copy in (
        as_jpeg(image, 30),
        image.resize((300, 200)),
        image.resize((900, 640)),
        image.point(_brighter),
    ):
        assert bits_apart(image, copy) <= MOST_BITS


def _brighter(value: int) -> int:
    return min(255, value + 12)


def test_other_images_have_another_hash() -> None:
    hashes = [perceptual_hash(scene(seed)) for seed in range(30)]
    found = nearest([each for each in hashes if each is not None])
    assert len(found) == 30
    assert set(found) == {None}


def test_a_flat_image_has_no_hash() -> None:
    noise = np.random.default_rng(0).normal(128, 2, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    assert perceptual_hash(Image.fromarray(noise)) is None
    assert perceptual_hash(Image.new("RGB", (40, 40), "white")) is None


def test_the_variance_of_the_laplacian_is_that_of_the_four_neighbours() -> None:
    # The two inner pixels see 10 and 0 in the middle: 4 * 10 - 0 = 40 and -10, of which the variance is 25².
    grey = np.array([[0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 0, 0]], dtype=np.uint8)
    assert laplacian_variance(grey) == 625
    assert laplacian_variance(np.full((5, 5), 255, dtype=np.uint8)) == 0


@pytest.mark.parametrize("pairs_at_once", [1, 7, 1 << 22], ids=["1", "7", "all"])
def test_the_nearest_hash_is_found_in_parts_too(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", pairs_at_once)
    hashes = [0, (1 << MOST_BITS) - 1, (1 << 64) - 1, 1, ((1 << (MOST_BITS + 1)) - 1) << 30]
    assert nearest(hashes) == [Nearest(3, 1), Nearest(3, MOST_BITS - 1), None, Nearest(0, 1), None]


def test_the_limit_of_bits_is_met_and_not_passed() -> None:
    assert nearest([0, (1 << MOST_BITS) - 1])[0] == Nearest(1, MOST_BITS)
    assert nearest([0, (1 << (MOST_BITS + 1)) - 1]) == [None, None]
    assert nearest([]) == []
    assert nearest([5]) == [None]
    assert nearest([5, 5]) == [Nearest(1, 0), Nearest(0, 0)]


def test_images_are_grouped_over_others() -> None:
    assert groups([[2], [], [4], [], [], [1]]) == [0, 1, 0, 3, 0, 1]


@pytest.mark.parametrize(
    ("text", "trigger", "held"),
    [
        ("a photo of sks cat", "sks", True),
        ("A photo of SKS cat", "sks", True),
        ("sksy cat", "sks", False),
        ("my_sks cat", "sks", False),
        ("sks, cat", "sks", True),
        ("黒い犬が走る", "犬", True),
        ("黒い猫が走る", "犬", False),
        ("sks犬が走る", "sks", True),
        ("a sks cat", "sks cat", True),
        ("a (sks:1.2) cat", "(sks:1.2)", True),
        ("", "sks", False),
    ],
    ids=str,
)
def test_a_trigger_is_found_as_whole_words_in_any_case(text: str, trigger: str, held: bool) -> None:
    assert holds(text, trigger) is held


def plan(folder: Path, **keys: Any) -> DatasetPlan:
    config = DatasetConfig(id="x", instance_data_dir=folder / "images", resolution=64.0, **keys)
    return plan_dataset(
        config,
        index=ImageIndex(folder / "index.json"),
        seed=1,
        alignment=64,
        aspect_decimals=2,
        caption_plan=caption_plan(config, DataConfig(), seed=1, caption_dropout=0),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image with a caption, one with an empty one and one without."""
    save(scene(1, 64, 64), tmp_path / "images" / "a.png", "red, blue, green")
    save(scene(2, 64, 64), tmp_path / "images" / "b.png", " ")
    save(scene(3, 64, 64), tmp_path / "images" / "c.png")
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "uncaptioned"),
    [
        ({}, ["b.png", "c.png"]),
        ({"caption_prefix": "sks,", "caption_suffix": "photo"}, ["b.png", "c.png"]),
        ({"instance_prompt": "a sks", "prepend_instance_prompt": True}, ["b.png", "c.png"]),
        ({"instance_prompt": "a sks", "only_instance_prompt": True}, []),
        ({"instance_prompt": "a sks", "caption_strategy": "instanceprompt", "caption_prefix": "x"}, []),
        ({"caption_strategy": "filename"}, []),
        ({"caption_filter_list": ["red, blue, green"]}, ["a.png", "b.png", "c.png"]),
    ],
    ids=["plain", "prefix", "prepended", "only", "instanceprompt", "filename", "filter"],
)
def test_a_caption_of_what_is_added_alone_is_none(
    folder: Path, keys: dict[str, Any], uncaptioned: list[str]
) -> None:
    found = plan(folder, **keys)
    names = [each.sample.path for each in found.images if is_uncaptioned(each, found.caption_plan)]
    assert names == uncaptioned


def test_every_variant_of_a_caption_is_shown_once(folder: Path) -> None:
    found = plan(folder, caption_shuffle={"enable": True, "count": 2})
    texts = texts_of(found.images[0])
    assert len(texts) == 3
    assert {frozenset(text.split(", ")) for text in texts} == {frozenset({"red", "blue", "green"})}


def test_tags_are_counted_by_image_and_words_where_there_are_no_tags(folder: Path) -> None:
    images = folder / "images"
    (images / "b.txt").write_text("red, old house, green\nred, garden, pond", encoding="utf-8")
    found = plan(folder)
    counts = count_texts(found.images, found.config)
    assert counts.noun == "tag"
    assert dict(counts.counts) == {"red": 2, "green": 2, "blue": 1, "old house": 1, "garden": 1, "pond": 1}
    assert [name for name, _ in counts.counts[:2]] == ["green", "red"], "the most frequent, then by name"
    assert (counts.num_captioned, counts.longest) == (2, ("b.png", 4))
    (images / "a.txt").write_text("a cat's tail, seen at night", encoding="utf-8")
    (images / "b.txt").write_text("A dog", encoding="utf-8")
    found = plan(folder)
    counts = count_texts(found.images, found.config)
    assert counts.noun == "word"
    assert dict(counts.counts)["a"] == 2
    assert "cat's" in dict(counts.counts)
    assert counts.median_words in (2, 6)


def test_without_captions_there_is_nothing_to_count(folder: Path) -> None:
    (folder / "images" / "a.txt").unlink()
    found = plan(folder)
    counts = count_texts(found.images, found.config)
    assert (counts.counts, counts.longest, counts.num_captioned) == ((), None, 0)

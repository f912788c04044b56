"""Held-out images: decided by their bytes, never trained, cached like others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

from simpletuner.helpers.caching.filling import encode_missing
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.held_out import chosen_to_evaluate, is_held_out
from simpletuner.helpers.data.preview import DatasetPreview, preview
from simpletuner.helpers.errors import DataError

Make = Callable[..., TrainingData]
SHARE = 0.4


def share_of(file: Path) -> float:
    """Where the bytes of a file stand in [0, 1)."""
    return xxhash.xxh3_128_intdigest(file.read_bytes()) / 2**128


def paint(folder: Path, number: int, *, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + number):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"image {index}\nanother caption")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return paint(tmp_path / "images", 20)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*entries: dict[str, object], **options: Any) -> TrainingData:
        datasets = [DatasetConfig(**{"resolution": 32, **entry}) for entry in entries]
        folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
        return TrainingData(
            datasets, folders, **{"seed": 1, "batch_size": 2, "pixel_alignment": 8, **options}
        )

    return made


def entry(folder: Path, **keys: object) -> dict[str, object]:
    return {"id": folder.name, "instance_data_dir": folder, **keys}


def filled(data: TrainingData) -> TrainingData:
    data.set_encoders(vae_identity="vae", text_identity="text")

    def latents(pixels: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return latents_entries(torch.nn.functional.avg_pool2d(torch.stack(pixels), 8))

    def texts(prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        return [text_entry(TextEmbeds(torch.full((1, 2, 2), float(len(each))))) for each in prompts]

    list(encode_missing(data.latents_requests(), latents, batch_size=4))
    list(encode_missing(data.text_requests(), texts, batch_size=4))
    return data


def held_out(data: TrainingData) -> set[str]:
    return {image.sample.path for image in data.divided.held_out}


def test_the_digest_of_its_bytes_decides_whether_an_image_is_held_out(make: Make, folder: Path) -> None:
    expected = {file.name for file in folder.glob("*.png") if share_of(file) < SHARE}
    assert 4 < len(expected) < 12
    data = make(entry(folder, eval_share=SHARE))
    assert held_out(data) == expected
    assert {sample.path for sample in data.samples} == {file.name for file in folder.glob("*.png")} - expected


def test_other_images_names_seeds_and_limits_change_nothing(make: Make, folder: Path, tmp_path: Path) -> None:
    before = {share_of(folder / name) for name in held_out(make(entry(folder, eval_share=SHARE)))}
    other = tmp_path / "other"
    for index, file in enumerate(sorted(folder.glob("*.png"), reverse=True)):
        (other / f"{index}").mkdir(parents=True)
        shutil.copy(file, other / f"{index}" / f"renamed {index}.png")
    paint(other, 10, first=100)
    data = make(entry(other, eval_share=SHARE), seed=99)
    assert before <= {share_of(other / name) for name in held_out(data)}
    part = make(entry(other, eval_share=SHARE, max_num_samples=15))
    assert held_out(part) == held_out(data) & (held_out(part) | {each.path for each in part.samples})
    larger = make(entry(folder, eval_share=SHARE + 0.3))
    assert held_out(make(entry(folder, eval_share=SHARE))) <= held_out(larger)


@pytest.mark.parametrize("repeats", [0, 3])
def test_held_out_images_are_trained_in_no_batch(make: Make, folder: Path, repeats: int) -> None:
    data = filled(make(entry(folder, eval_share=SHARE, repeats=repeats)))
    batches = data.batches()
    seen = {sample.path for _ in range(3 * data.batches_per_epoch) for sample in next(batches).samples}
    assert seen == {sample.path for sample in data.samples}
    assert not seen & held_out(data)


def test_an_eval_dataset_is_held_out_as_a_whole_and_cached_like_others(
    make: Make, folder: Path, tmp_path: Path
) -> None:
    others = paint(tmp_path / "others", 3, first=50)
    data = filled(make(entry(folder), entry(others, dataset_type="eval")))
    assert held_out(data) == {"50.png", "51.png", "52.png"}
    assert {sample.dataset_id for sample in data.samples} == {"images"}
    alone = filled(make(entry(folder)))
    assert data.batches_per_epoch == alone.batches_per_epoch
    for image in data.divided.held_out:
        item = data.evaluated_item(image, index=0)
        assert item.sample.caption == f"image {image.sample.path[:2]}"
        assert item.latents.shape == (3, 4, 4)


def test_an_evaluated_image_has_its_first_caption_at_every_index(make: Make, folder: Path) -> None:
    data = filled(make(entry(folder, eval_share=SHARE), caption_dropout=0.9))
    image = data.divided.held_out[0]
    captions = {data.evaluated_item(image, index=index).sample.caption for index in range(20)}
    assert captions == {f"image {int(image.sample.path[:2])}"}


@pytest.mark.parametrize("first", ["trained", "held out"])
def test_bytes_that_one_dataset_holds_out_are_trained_in_no_other(
    make: Make, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(folder, copies)
    entries = [entry(folder), entry(copies, eval_share=SHARE)]
    data = make(*(entries if first == "trained" else entries[::-1]))
    assert not {each.path for each in data.samples} & held_out(data)
    assert {image.sample.dataset_id for image in data.divided.held_out} == {"copies"}
    assert "another dataset holds out the same bytes" in caplog.text
    assert caplog.text.count("same bytes") == 1


def test_a_share_that_leaves_nothing_to_train_is_an_error(make: Make, folder: Path) -> None:
    with pytest.raises(DataError, match=r"its 20 images are held out .eval_share 0.999.*Lower eval_share"):
        make(entry(folder, eval_share=0.999))


def test_copies_of_held_out_images_alone_are_an_error(make: Make, folder: Path, tmp_path: Path) -> None:
    copies, other = tmp_path / "copies", paint(tmp_path / "other", 2, first=70)
    shutil.copytree(folder, copies)
    with pytest.raises(DataError, match=r"'images': its 20 images are held out .another dataset"):
        make(entry(folder), entry(other), entry(copies, dataset_type="eval"))


def test_a_share_that_holds_out_nothing_says_so(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = paint(tmp_path / "few", 2)
    data = make(entry(few, eval_share=0.001))
    assert not held_out(data)
    assert "eval_share 0.001 holds out none of its 2 images" in caplog.text


def test_damage_is_left_out_of_the_held_out_images_too(
    make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = filled(make(entry(folder, eval_share=SHARE)))
    first = data.divided.held_out[0]
    trained = {each.path for each in data.samples}
    with caplog.at_level(logging.WARNING):
        data.leave_out({first.digest: "broken"})
    assert first.sample.path not in held_out(data)
    assert {each.path for each in data.samples} == trained
    assert [each.path for each in data.skipped] == [first.sample.path]


def test_facts_tell_held_out_images_from_trained_ones(make: Make, folder: Path) -> None:
    plain, shared = (make(entry(folder, **keys)).facts() for keys in ({}, {"eval_share": SHARE}))
    count = sum(share_of(file) < SHARE for file in folder.glob("*.png"))
    assert "held-out part of dataset images, number of images" not in plain
    assert shared["held-out part of dataset images, number of images"] == count
    assert shared["dataset images, number of images"] == 20 - count
    changed = {key for key in plain if plain[key] != shared[key]}
    assert "dataset images, hash of all images" in changed


def test_the_lowest_digests_are_evaluated_beside_as_many_training_images(make: Make, folder: Path) -> None:
    data = make(entry(folder, eval_share=SHARE)).divided
    chosen, trained = chosen_to_evaluate(data, most=3)
    assert [each.digest for each in chosen] == sorted(each.digest for each in data.held_out)[:3]
    images = [image for plan in data.trained for image in plan.images]
    assert [each.digest for each in trained] == sorted(each.digest for each in images)[:3]
    everything, some = chosen_to_evaluate(data, most=100)
    assert len(everything) == len(data.held_out)
    assert len(some) == min(len(everything), len(images))


def test_training_images_to_compare_with_are_of_the_datasets_with_a_share(
    make: Make, folder: Path, tmp_path: Path
) -> None:
    subject, of_class = paint(tmp_path / "subject", 6, first=30), paint(tmp_path / "class", 6, first=60)
    keeps = entry(of_class, is_regularisation_data=True)
    shared = make(entry(folder, eval_share=SHARE), entry(subject), keeps).divided
    assert {each.sample.dataset_id for each in chosen_to_evaluate(shared, most=20)[1]} == {"images"}
    whole = make(entry(folder), keeps, entry(subject, dataset_type="eval")).divided
    assert {each.sample.dataset_id for each in chosen_to_evaluate(whole, most=20)[1]} == {"images"}


def test_one_dataset_alone_is_evaluated_by_its_id(make: Make, folder: Path, tmp_path: Path) -> None:
    others = paint(tmp_path / "others", 3, first=50)
    data = make(entry(folder, eval_share=SHARE), entry(others, dataset_type="eval")).divided
    chosen, _ = chosen_to_evaluate(data, most=20, dataset_ids=("others",))
    assert {each.sample.dataset_id for each in chosen} == {"others"}
    assert len({each.sample.dataset_id for each in chosen_to_evaluate(data, most=20)[0]}) == 2


def test_preview_counts_the_images_that_the_run_holds_out(make: Make, folder: Path, tmp_path: Path) -> None:
    def seen(**keys: object) -> DatasetPreview:
        config = DatasetConfig(**{"resolution": 32, **entry(folder, **keys)})
        folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
        return preview(config, folders, alignment=8, seed=1, reads_all=True)

    data = make(entry(folder, eval_share=SHARE))
    found = seen(eval_share=SHARE)
    assert (found.num_held_out, found.num_trained) == (len(held_out(data)), len(data.samples))
    assert (seen().num_held_out, seen().num_trained) == (0, 20)
    assert (seen(dataset_type="eval").num_held_out, seen(dataset_type="eval").num_trained) == (20, 0)


@pytest.mark.parametrize(("digest", "expected"), [("0" * 32, True), ("3f" * 16, True), ("41" * 16, False)])
def test_a_digest_below_the_share_is_held_out(digest: str, expected: bool, tmp_path: Path) -> None:
    config = DatasetConfig(id="a", instance_data_dir=tmp_path, eval_share=0.25)
    assert is_held_out(config, digest) is expected
    assert not is_held_out(DatasetConfig(id="a", instance_data_dir=tmp_path), "0" * 32)


def test_an_evaluated_image_has_the_strength_of_its_dataset(make: Make, folder: Path, tmp_path: Path) -> None:
    others = paint(tmp_path / "others", 1, first=50)
    data = make(
        entry(folder, eval_share=SHARE, slider_strength=-2),
        entry(others, dataset_type="eval"),
    )
    strengths = {image.sample.dataset_id: data.evaluated_strength(image) for image in data.divided.held_out}
    assert strengths == {"images": -2, "others": 1}


def test_references_of_held_out_images_are_cached_and_those_of_the_first_epoch(
    make: Make, folder: Path
) -> None:
    making = [{"type": "superresolution"}, {"type": "jpeg_artifacts"}]
    data = filled(make(entry(folder, eval_share=SHARE, conditioning=making)))
    for image in data.divided.held_out:
        items = [data.evaluated_item(image, index=index) for index in range(3)]
        assert [len(item.references) for item in items] == [1, 1, 1]
        assert all(torch.equal(item.references[0], items[0].references[0]) for item in items)
        assert not torch.equal(items[0].references[0], items[0].latents)


def test_the_first_variant_of_a_held_out_caption_is_encoded_alone(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "tagged"
    folder.mkdir()
    for index, name in enumerate(("trained", "evaluated")):
        place = folder / name
        place.mkdir()
        Image.new("RGB", (32, 32), (index, 0, 0)).save(place / "a.png")
        (place / "a.txt").write_text("{red|blue} ball")
    wild = {"enable_wildcard": True}
    data = make(entry(folder / "trained", **wild), entry(folder / "evaluated", dataset_type="eval", **wild))
    (image,) = data.divided.held_out
    assert len(image.captions[0]) == 4
    trained = [
        variant for plan in data.divided.trained for each in plan.images for variant in each.captions[0]
    ]
    assert data.captions() == tuple(dict.fromkeys([*trained, image.captions[0][0]]))

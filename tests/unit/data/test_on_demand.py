"""What the caches lack is encoded once a batch needs it."""

from __future__ import annotations

import logging
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.helpers.caching.filling import MASK, TEXT_ENCODER, VAE, encode_missing
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.masks import mask_entries
from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Batch, TextEmbeds
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.on_demand import OnDemand
from simpletuner.helpers.errors import DataError, TrainingError


class Encoders:
    """Note what they are given, and in which thread."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.texts: list[list[str]] = []
        self.threads: set[threading.Thread] = set()

    def encode_images(self, pixels: list[Tensor]) -> list[dict[str, Tensor]]:
        self.images.append(len(pixels))
        self.threads.add(threading.current_thread())
        return latents_entries(torch.nn.functional.avg_pool2d(torch.stack(pixels), 8))

    def encode_texts(self, texts: list[str]) -> list[dict[str, Tensor]]:
        self.texts.append(texts)
        self.threads.add(threading.current_thread())
        return [text_entry(TextEmbeds(torch.full((1, 4, 2), float(len(text))))) for text in texts]


def data_of(
    folder: Path, *, cache: str = "cache", batch_size: int = 2, is_off: bool = False, **keys: object
) -> TrainingData:
    references = keys.pop("conditioning", ())
    dataset = DatasetConfig(id="cats", instance_data_dir=folder / "images", resolution=64, **keys)
    folders = DataConfig(
        cache_dir_vae=folder / cache / "vae",
        cache_dir_text=folder / cache / "text",
        vae_cache_disable=is_off,
        text_cache_disable=is_off,
    )
    return TrainingData(
        [dataset], folders, seed=1, batch_size=batch_size, pixel_alignment=64, conditioning=references
    )


def on_demand(
    data: TrainingData, encoders: Encoders, *, size: int = 2, only: str | None = None
) -> TrainingData:
    known = {
        VAE: (encoders.encode_images, size),
        MASK: (mask_entries, 1),
        TEXT_ENCODER: (encoders.encode_texts, 1),
    }
    data.set_encoders(vae_identity="vae", text_identity="clip")
    chosen = {name: each for name, each in known.items() if only in (None, name)}
    data.encode_on_demand(OnDemand(chosen, watch=LoaderWatch()))
    return data


def encoded_before(data: TrainingData) -> TrainingData:
    encoders = Encoders()
    data.set_encoders(vae_identity="vae", text_identity="clip")
    list(encode_missing(data.latents_requests(), encoders.encode_images, batch_size=1))
    list(encode_missing(data.mask_requests(), mask_entries, batch_size=1))
    list(encode_missing(data.text_requests(), encoders.encode_texts, batch_size=1))
    return data


def taken(data: TrainingData, number: int) -> list[Batch]:
    return list(islice(data.batches(), number))


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert [each.samples for each in batches] == [each.samples for each in expected]
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.text.prompt_embeds, theirs.text.prompt_embeds)
        assert all(map(torch.equal, ours.references, theirs.references))
        assert (ours.loss_mask is None) == (theirs.loss_mask is None)
        assert ours.loss_mask is None or torch.equal(ours.loss_mask, theirs.loss_mask)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("cat" * number)
    return tmp_path


def test_batches_are_those_of_caches_that_were_filled_before(folder: Path) -> None:
    encoders = Encoders()
    data = on_demand(data_of(folder), encoders)
    first = next(iter(data.batches()))
    assert sum(encoders.images) <= len(first) * 2  # of this batch, and of none but the next
    batches = taken(data, 9)
    assert_same(batches, taken(encoded_before(data_of(folder, cache="other")), 9))
    assert sum(encoders.images) == 5
    assert sorted(text for texts in encoders.texts for text in texts) == [
        "cat" * number for number in range(5)
    ]
    assert encoders.threads == {threading.current_thread()}


def test_entries_stay_for_the_next_start(folder: Path) -> None:
    data = on_demand(data_of(folder), Encoders())
    taken(data, 5)
    data.flush()
    encoders = Encoders()
    assert_same(taken(on_demand(data_of(folder), encoders), 5), taken(data, 5))
    assert (encoders.images, encoders.texts) == ([], [])


def test_datasets_of_one_folder_have_an_entry_each(folder: Path) -> None:
    def data(cache: str) -> TrainingData:
        datasets = [
            DatasetConfig(id=name, instance_data_dir=folder / "images", resolution=64) for name in ("a", "b")
        ]
        folders = DataConfig(cache_dir_vae=folder / cache / "vae", cache_dir_text=folder / cache / "text")
        return TrainingData(datasets, folders, seed=1, batch_size=2, pixel_alignment=64)

    assert_same(taken(on_demand(data("one"), Encoders()), 12), taken(encoded_before(data("two")), 12))


def test_an_entry_is_looked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = on_demand(encoded_before(data_of(folder)), Encoders())
    looked_for: list[object] = []
    held = TensorStore.__contains__
    monkeypatch.setattr(
        TensorStore, "__contains__", lambda store, key: looked_for.append(key) or held(store, key)
    )
    taken(data, 12)
    assert len(looked_for) == len(set(looked_for)) == 10


def test_a_damaged_entry_is_made_anew(folder: Path) -> None:
    expected = taken(encoded_before(data_of(folder)), 5)
    (shard,) = (folder / "cache" / "vae" / "cats").glob("shard*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    encoders = Encoders()
    assert_same(taken(on_demand(data_of(folder), encoders), 5), expected)
    assert encoders.images == [1]


def test_references_are_encoded_with_their_images(folder: Path) -> None:
    (folder / "before").mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (0, 40 * number, 0)).save(folder / "before" / f"{number}.png")
    entry = ReferenceConfig(
        id="before", instance_data_dir=folder / "before", conditioning_type="reference_strict"
    )
    keys = {"conditioning": [entry], "conditioning_data": ["before"]}
    batches = taken(on_demand(data_of(folder, **keys), Encoders()), 4)
    assert_same(batches, taken(encoded_before(data_of(folder, cache="other", **keys)), 4))


def test_with_caches_off_batches_are_the_same_and_no_entry_is_written(folder: Path) -> None:
    encoders = Encoders()
    batches = taken(on_demand(data_of(folder, is_off=True), encoders), 9)
    assert_same(batches, taken(encoded_before(data_of(folder, cache="other")), 9))
    assert not [*(folder / "cache").rglob("shard*")]
    assert sum(encoders.images) >= sum(map(len, batches))


def test_with_caches_off_the_next_batch_does_not_count_on_an_entry_of_this_one(folder: Path) -> None:
    data, encoders = data_of(folder, is_off=True), Encoders()
    data.set_encoders(vae_identity="vae", text_identity="clip")
    encoder = OnDemand({TEXT_ENCODER: (encoders.encode_texts, 1)}, watch=LoaderWatch())
    requests = list(data.text_requests())
    with encoder.encoded(encoder.load(requests)):
        data.text_embeds("cat")
        assert len(encoder.load(requests)) == len(requests)
    with pytest.raises(DataError, match="lacks the prompt 'cat'"):
        data.text_embeds("cat")


def masked(folder: Path) -> dict[str, object]:
    (folder / "masks").mkdir()
    for number in range(5):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 8 * number, 64))
        mask.save(folder / "masks" / f"{number}.png")
    entry = ConditioningConfig(id="masks", instance_data_dir=folder / "masks", conditioning_type="mask")
    return {"conditioning": [entry], "conditioning_data": ["masks"]}


def test_with_caches_off_masks_are_read_with_their_images(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = masked(folder)
    data = on_demand(data_of(folder, is_off=True, **keys), Encoders())
    assert len(data.mask_requests()) == len(data.latents_requests()) == 0
    with caplog.at_level(logging.ERROR):
        batches = taken(data, 10)
    masks = {
        sample.path: mask
        for batch in batches
        for sample, mask in zip(batch.samples, batch.loss_mask, strict=True)
    }
    assert masks.keys() == {f"{number}.png" for number in range(1, 5)}
    assert all(mask[0, 0].sum() == int(path[0]) for path, mask in masks.items())
    assert caplog.messages[-1].startswith("0.png cannot be used: its mask is black everywhere")
    assert not [*(folder / "cache").rglob("shard*")]


def test_with_caches_off_what_was_encoded_before_the_first_batch_stays(folder: Path) -> None:
    data = data_of(folder, is_off=True)
    data.set_encoders(vae_identity="vae", text_identity="clip")
    list(encode_missing(data.text_requests(["a dog"]), Encoders().encode_texts, batch_size=1))
    encoders = Encoders()
    taken(on_demand(data, encoders), 9)
    assert encoders.texts == []
    assert data.text_embeds("a dog").prompt_embeds[0, 0, 0] == len("a dog")


@pytest.mark.parametrize("only", [VAE, TEXT_ENCODER])
def test_the_other_cache_must_be_full(folder: Path, only: str) -> None:
    data = on_demand(data_of(folder), Encoders(), only=only)
    with pytest.raises(DataError, match="No image of this size has whole cache entries"):
        taken(data, 1)


def test_a_damaged_image_is_replaced_by_the_next_of_its_size(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "images" / "2.png"
    file.write_bytes(file.read_bytes()[:-30])
    with caplog.at_level(logging.ERROR):
        batches = taken(on_demand(data_of(folder), Encoders()), 15)
    names = [sample.path for batch in batches for sample in batch.samples]
    assert names.count("3.png") == 12  # of 6 passes
    assert {names.count(f"{number}.png") for number in (0, 1, 4)} == {6}
    (line,) = caplog.messages
    assert line.startswith("2.png cannot be used: ")
    assert line.endswith("The next image of its size is trained in its place.")


def test_a_folder_of_damaged_images_ends_the_run(folder: Path) -> None:
    for file in (folder / "images").glob("*.png"):
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="No image of this size has whole cache entries"):
        taken(on_demand(data_of(folder), Encoders()), 1)


def test_an_image_that_vanished_ends_the_run_by_its_name(folder: Path) -> None:
    data = on_demand(data_of(folder), Encoders())
    for file in (folder / "images").glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"\d\.png: "):
        taken(data, 1)


def test_an_encoders_infinite_value_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(pixels: list[Tensor]) -> list[dict[str, Tensor]]:
        return latents_entries(torch.full((len(pixels), 4, 8, 8), float("inf")))

    encoders = Encoders()
    monkeypatch.setattr(encoders, "encode_images", infinite)
    with pytest.raises((DataError, TrainingError), match="not finite"):
        taken(on_demand(data_of(folder), encoders), 1)


@pytest.mark.parametrize(("size", "expected"), [(1, {1}), (4, {4})])
def test_images_of_a_batch_are_encoded_together(folder: Path, size: int, expected: set[int]) -> None:
    encoders = Encoders()
    next(iter(on_demand(data_of(folder, batch_size=4), encoders, size=size).batches()))
    assert set(encoders.images) == expected

"""Caches are filled with each encoder loaded only while it is needed, and the progress of both is logged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.helpers.caching.prefetch import FIRST_NOTICE_S, LoaderWatch
from simpletuner.helpers.checkpointing.preemption import Preempted, Preemption
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.data import pixels
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.images import decode_image
from simpletuner.helpers.errors import DataError, LoaderTimeoutError
from simpletuner.helpers.training import caches
from simpletuner.helpers.training.preparing import build_watch

VALIDATION = "a cat on a beach"


class Family:
    """Encoders of means and lengths, which note when they are loaded, used and freed."""

    vae_identity = "vae"
    text_identity = "clip"

    def __init__(self) -> None:
        self.events: list[str] = []

    def load_vae(self) -> None:
        self.events.append("load vae")

    def unload_vae(self) -> None:
        self.events.append("unload vae")

    def load_text_encoders(self) -> None:
        self.events.append("load text encoders")

    def unload_text_encoders(self) -> None:
        self.events.append("unload text encoders")

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.events.append(f"images {len(pixels)}")
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        self.events.append(f"prompts {len(prompts)}")
        return [TextEmbeds(prompt_embeds=torch.full((1, 4, 2), float(len(prompt)))) for prompt in prompts]


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / "images" / f"cat_{number}.png")
    dataset = DatasetConfig(id="cats", instance_data_dir=tmp_path / "images", resolution=64)
    folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
    return TrainingData([dataset], folders, seed=1, batch_size=1, pixel_alignment=64)


def fill(
    data: TrainingData,
    family: Family,
    *,
    preemption: Preemption | None = None,
    wait: Callable[[], None] = lambda: None,
    on_demand: tuple[str, ...] = (),
    off: tuple[str, ...] = (),
    process: tuple[int, int] = (0, 1),
) -> None:
    config = SimpleNamespace(
        validation=SimpleNamespace(validation_negative_prompt="blurry"),
        precision=SimpleNamespace(vae_batch_size=2),
        data=SimpleNamespace(
            text_encoder_batch_size=2,
            vae_cache_ondemand="vae" in on_demand,
            text_cache_ondemand="text" in on_demand,
            vae_cache_disable="vae" in off,
            text_cache_disable="text" in off,
        ),
    )
    accelerator = SimpleNamespace(process_index=process[0], num_processes=process[1], wait_for_everyone=wait)
    caches.fill_caches(
        data,
        [SimpleNamespace(text=VALIDATION)],
        config=config,
        family=family,
        accelerator=accelerator,
        preemption=preemption or Preemption(),
    )


def test_one_encoder_after_the_other_is_loaded_and_freed(data: TrainingData) -> None:
    family = Family()
    fill(data, family)
    images, texts = ["load vae", "images 2", "load vae", "images 1", "unload vae"], 3 * ["load text encoders"]
    assert family.events[:5] == images
    assert family.events[5::2] == [*texts, "unload text encoders"]
    assert family.events[6::2] == ["prompts 2", "prompts 2", "prompts 1"]
    for prompt in ("cat 0", VALIDATION, "blurry"):
        assert data.text_embeds(prompt).prompt_embeds[0, 0, 0] == len(prompt)


@pytest.mark.parametrize(
    ("on_demand", "before"),
    [
        (("vae",), 3 * ["load text encoders", "prompts"] + ["unload text encoders"]),
        (("text",), [*2 * ["load vae", "images"], "unload vae", "load text encoders", "prompts"]),
        (("vae", "text"), ["load text encoders", "prompts"]),
    ],
    ids=["images", "captions", "both"],
)
def test_encoders_on_demand_stay_and_only_prompts_of_validation_are_encoded_before(
    data: TrainingData, on_demand: tuple[str, ...], before: list[str]
) -> None:
    family = Family()
    fill(data, family, on_demand=on_demand)
    assert [event.rstrip(" 0123456789") for event in family.events] == before
    assert data.text_embeds(VALIDATION).prompt_embeds[0, 0, 0] == len(VALIDATION)
    family.events.clear()
    batches = data.batches()
    assert len({next(batches).samples[0].path for _ in range(3)}) == 3
    assert [event for event in family.events if event.startswith("images")] == ["images 1"] * (
        3 * ("vae" in on_demand)
    )
    assert [event for event in family.events if event.startswith("prompts")] == ["prompts 1"] * (
        3 * ("text" in on_demand)
    )
    assert not [event for event in family.events if event.startswith("unload")]


def test_with_caches_off_every_process_encodes_what_validation_reads(
    data: TrainingData, tmp_path: Path
) -> None:
    settings = data.data.model_copy(update={"vae_cache_disable": True, "text_cache_disable": True})
    data = TrainingData(data.datasets, settings, seed=1, batch_size=1, pixel_alignment=64)
    family = Family()
    fill(data, family, off=("vae", "text"), process=(1, 2))
    assert family.events == ["load text encoders", "prompts 2"]
    assert data.text_embeds(VALIDATION).prompt_embeds[0, 0, 0] == len(VALIDATION)
    assert len({next(data.batches()).samples[0].path for _ in range(3)}) == 1
    assert [event for event in family.events if event.startswith("images")] == 3 * ["images 1"]
    assert not [*tmp_path.rglob("shard*")]


@pytest.mark.parametrize("number", [0, 3])
def test_masks_are_cached_once_every_process_knows_its_images(tmp_path: Path, number: int) -> None:
    """A barrier before the first mask; none without masks."""
    masks, images = tmp_path / "masks", tmp_path / "images"
    for folder in (masks, images):
        folder.mkdir()
        for each in range(3):
            Image.new("RGB", (64, 64), (9 * each, 0, 0)).save(folder / f"{each}.png")
    entry = ConditioningConfig(id="masks", instance_data_dir=masks, conditioning_type="mask")
    ids = ["masks"] if number else []
    dataset = DatasetConfig(id="cats", instance_data_dir=images, resolution=64, conditioning_data=ids)
    folders = DataConfig(cache_dir_vae=tmp_path / "vae", cache_dir_text=tmp_path / "text")
    options = {"seed": 1, "batch_size": 1, "pixel_alignment": 64}
    data = TrainingData([dataset], folders, conditioning=[entry] if number else [], **options)
    family, stored = Family(), []

    def wait() -> None:
        stored.append([each.key in each.store for each in data.mask_requests()])

    fill(data, family, wait=wait)
    assert stored == ([[False] * number] if number else [])
    # The first mask is black.
    assert [each.path for each in data.skipped] == (["0.png"] if number else [])
    assert all(each.key in each.store for each in data.mask_requests())


def test_references_are_encoded_before_the_vae_is_freed(tmp_path: Path) -> None:
    for folder, red in (("images", 0), ("before", 100)):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", (64, 64), (red + number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    entry = ReferenceConfig(
        id="before", instance_data_dir=tmp_path / "before", conditioning_type="reference_strict"
    )
    dataset = DatasetConfig(
        id="cats",
        instance_data_dir=tmp_path / "images",
        resolution=64,
        conditioning_data=["before"],
        conditioning={"type": "canny"},
    )
    folders = DataConfig(
        cache_dir_vae=tmp_path / "vae",
        cache_dir_text=tmp_path / "text",
        conditioning_multidataset_sampling="combined",
    )
    data = TrainingData([dataset], folders, conditioning=[entry], seed=1, batch_size=1, pixel_alignment=64)
    family = Family()
    data.depth = SimpleNamespace(unload=lambda: family.events.append("unload depth"))
    fill(data, family)
    assert family.events.index("unload depth") == family.events.index("unload vae") + 1
    vae = family.events[: family.events.index("unload vae")]
    assert vae[1::2] == ["images 2", "images 1", "images 2", "images 2", "images 2"]
    found = next(data.batches())
    image, before, edges = (
        round((float(each[0, 0].mean()) + 1) * 127.5) for each in (found.latents, *found.references)
    )
    assert (before, edges) == (image + 100, 0)


def test_cached_entries_load_no_encoder(data: TrainingData, caplog: pytest.LogCaptureFixture) -> None:
    fill(data, Family())
    family = Family()
    with caplog.at_level(logging.INFO):
        fill(data, family)
    assert family.events == ["unload vae", "unload text encoders"]
    assert len([each for each in caplog.messages if "cached" in each]) == 2


@pytest.mark.reliability_row(3)
def test_a_signal_does_not_part_processes_that_have_nothing_to_encode(data: TrainingData) -> None:
    fill(data, Family())
    preemption = Preemption()
    preemption.requested = True
    family = Family()
    fill(data, family, preemption=preemption)  # the stop is agreed in the next step, behind the barrier
    assert family.events == ["unload vae", "unload text encoders"]


@pytest.mark.reliability_row(31)
def test_image_that_never_loads_ends_the_caching_with_its_name(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(pixels, "decode_image", lambda _: released.wait() and None)
    data.watch = LoaderWatch(timeout_s=0.1)
    with pytest.raises(LoaderTimeoutError, match=r"cat_0\.png"):
        fill(data, Family())
    released.set()


@pytest.mark.parametrize(("num_processes", "stop_after_s"), [(1, 2.0), (2, FIRST_NOTICE_S)])
def test_watch_has_the_limit_of_the_run_and_stops_one_process_of_several_late(
    num_processes: int, stop_after_s: float
) -> None:
    config: Any = SimpleNamespace(data=DataConfig(loader_timeout_seconds=7))
    accelerator: Any = SimpleNamespace(num_processes=num_processes)
    watch = build_watch(config, accelerator, preemption := Preemption())
    assert (watch.timeout_s, watch.stop_after_s) == (7.0, stop_after_s)
    preemption.requested = True
    with pytest.raises(Preempted, match="the disk was slow"):
        watch.check("the disk was slow")


def test_images_that_another_process_found_damaged_are_left_out(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other, kept = (image.digest for image in data.divided.trained[0].images)
    file = Path(data.divided.trained[0].images[0].file.place)
    monkeypatch.setattr(
        caches, "gather_object", lambda found: [*found, (other, "it is damaged: another process says so")]
    )
    monkeypatch.setattr(pixels, "decode_image", damaged_if(file.read_bytes()))
    fill(data, Family())
    assert {own: data.damaged[own]} == data.damaged
    assert [image.digest for image in data.divided.trained[0].images] == [kept]
    assert [each.reason for each in data.skipped] == [
        "it is cut off",
        "it is damaged: another process says so",
    ]


def damaged_if(content: bytes) -> Callable[[bytes], Image.Image]:
    """A decoder that refuses one file."""

    def decode(data: bytes) -> Image.Image:
        if data == content:
            raise DataError("it is cut off")
        return decode_image(data)

    return decode


def test_progress_of_images_and_of_captions_is_logged(
    data: TrainingData, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(step=100)
    monkeypatch.setattr(caches.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        fill(data, Family())
    for progress in (
        "2 of 3 images",
        "3 of 3 images",
        "2 of 5 captions",
        "4 of 5 captions",
        "5 of 5 captions",
    ):
        assert progress in caplog.text


@pytest.mark.parametrize(
    ("noun", "events"),
    [("images", ["load vae", "images 2"]), ("captions", ["load text encoders", "prompts 2"])],
)
def test_a_signal_stops_before_the_next_batch(data: TrainingData, noun: str, events: list[str]) -> None:
    preemption, family = Preemption(), Family()
    encode = family.encode_images if noun == "images" else family.encode_prompts

    def encode_and_signal(inputs: Tensor | list[str]) -> Tensor | list[TextEmbeds]:
        preemption.requested = True
        return encode(inputs)

    if noun == "images":
        family.encode_images = encode_and_signal
    else:
        family.encode_prompts = encode_and_signal
    with pytest.raises(Preempted, match=noun):
        fill(data, family, preemption=preemption)
    assert family.events[-2:] == events


def test_a_signal_between_the_stages_loads_no_text_encoder(data: TrainingData) -> None:
    preemption, family = Preemption(), Family()

    def unload_and_signal() -> None:
        preemption.requested = True

    family.unload_vae = unload_and_signal
    with pytest.raises(Preempted, match="captions"):
        fill(data, family, preemption=preemption)
    assert "load text encoders" not in family.events

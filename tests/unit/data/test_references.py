"""References: found beside their images, cut, cached, drawn, and in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.caching.filling import encode_missing
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.masks import mask_entries
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import Batch, Sample, Size, TextEmbeds
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.preview import preview
from simpletuner.helpers.data.references import PlannedReference, bucket_name
from simpletuner.helpers.errors import DataError

Make = Callable[..., TrainingData]
NAMES = ("in/0", "1", "2", "3")


def paint(folder: Path, name: str, *, red: int, size: tuple[int, int] = (64, 64)) -> None:
    """A picture whose colours vary, so that another cut has other pixels."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    values = np.stack([np.full_like(across, red), across, down], axis=-1)
    Image.fromarray(values.astype(np.uint8)).save(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, the first in a subfolder, and the references of two entries."""
    for number, name in enumerate(NAMES):
        for start, entry in ((0, "photos"), (100, "before"), (200, "sketch")):
            paint(tmp_path / entry, f"{name}.png", red=start + number)
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Make:
    def made(
        *references: str,
        kind: str = "reference_strict",
        entry: dict[str, object] | None = None,
        conditioning: Sequence[ConditioningConfig] = (),
        sampling: str = "random",
        **options: object,
    ) -> TrainingData:
        names = references or ("before",)
        entries = [
            ReferenceConfig(id=name, instance_data_dir=folder / name, conditioning_type=kind, **(entry or {}))
            for name in names
        ]
        own = {
            key: options.pop(key)
            for key in ("seed", "batch_size", "num_processes", "process_index")
            if key in options
        }
        ids = [*names, *(each.id for each in conditioning)]
        values = {"resolution": 64, "conditioning_data": ids, **options}
        return TrainingData(
            [DatasetConfig(id="photos", instance_data_dir=folder / "photos", **values)],
            DataConfig(
                cache_dir_vae=folder / "cache" / "vae",
                cache_dir_text=folder / "cache" / "text",
                conditioning_multidataset_sampling=sampling,
            ),
            conditioning=[*reversed(entries), *conditioning],
            **{"seed": 42, "batch_size": 2, "pixel_alignment": 16, **own},
        )

    return made


def cached(data: TrainingData) -> TrainingData:
    """The data with full caches, its latents the means of cells of 8 pixels."""

    def latents(pixels: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return latents_entries(torch.nn.functional.avg_pool2d(torch.stack(pixels), 8))

    def texts(prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        return [text_entry(TextEmbeds(prompt_embeds=torch.ones(1, 1, len(prompt)))) for prompt in prompts]

    data.set_encoders(vae_identity="vae", text_identity="text")
    for _ in encode_missing(data.latents_requests(), latents, batch_size=2):
        pass
    for _ in encode_missing(data.mask_requests(), mask_entries, batch_size=1):
        pass
    for _ in encode_missing(data.text_requests(), texts, batch_size=1):
        pass
    data.leave_out(data.damaged)
    return data


def batch(data: TrainingData, index: int) -> Batch:
    return next(data.batches(start=index))


def red(latents: torch.Tensor) -> list[int]:
    """The red of each picture in a batch of latents, which says what picture it is."""
    return [round((float(each[0].mean()) + 1) * 127.5) for each in latents]


def planned(data: TrainingData) -> list[tuple[PlannedReference, ...]]:
    return [image.references for image in data.divided.trained[0].images]


def cut(sample: Sample) -> tuple[Size, tuple[int, int], Size]:
    return sample.resized_px, sample.crop_top_left, sample.target_px


def test_a_batch_holds_the_reference_of_each_of_its_images(make: Make) -> None:
    data = cached(make())
    for index in range(4):
        found = batch(data, index)
        assert len(found.references) == 1
        assert red(found.references[0]) == [each + 100 for each in red(found.latents)]


def test_a_batch_without_references_has_none(make: Make) -> None:
    assert batch(cached(make(conditioning_data=[])), 0).references == ()


@pytest.mark.parametrize("enlarged", [1, 2], ids=["same size", "twice the size"])
def test_a_strict_reference_gets_the_very_cut_of_its_image(make: Make, folder: Path, enlarged: int) -> None:
    for name in NAMES:
        paint(folder / "photos", f"{name}.png", red=1, size=(96, 64))
        paint(folder / "before", f"{name}.png", red=2, size=(96 * enlarged, 64 * enlarged))
    data = make(crop=True, crop_style="random", resolution=48)
    crops = {image.sample.crop_top_left for image in data.divided.trained[0].images}
    assert len(crops) > 1
    for image in data.divided.trained[0].images:
        (reference,) = image.references
        assert cut(reference.sample) == cut(image.sample)
        assert reference.sample.original_px == Size(64 * enlarged, 96 * enlarged)


def test_the_latents_of_a_strict_pair_of_the_same_picture_are_the_same_bytes(
    make: Make, folder: Path
) -> None:
    for number, name in enumerate(NAMES):
        paint(folder / "photos", f"{name}.png", red=number, size=(80, 64))
        (folder / "before" / f"{name}.png").unlink()
        paint(folder / "before", f"{name}.bmp", red=number, size=(80, 64))
    data = cached(make(crop=True, crop_style="random", resolution=48))
    requests = data.latents_requests()
    assert len({each.key for each in requests}) == 8  # other files
    assert len({each.store.folder for each in requests}) == 1
    found = batch(data, 0)
    assert torch.equal(found.references[0], found.latents)
    for image in data.divided.trained[0].images:
        keys = [data._cached.latents_key(each) for each in (image, *image.references)]
        first, second = (requests[0].store.get(key) for key in keys)
        assert first is not None
        assert second is not None
        assert first["latents"].numpy().tobytes() == second["latents"].numpy().tobytes()


def test_a_reference_that_is_its_image_is_encoded_once(make: Make, folder: Path) -> None:
    (folder / "before" / "1.png").write_bytes((folder / "photos" / "1.png").read_bytes())
    data = make()
    data.set_encoders(vae_identity="vae", text_identity="text")
    assert len(data.latents_requests()) == 8
    assert len({each.key for each in data.latents_requests()}) == 7


def test_a_loose_reference_is_cut_by_itself_at_the_resolution_of_its_image(make: Make, folder: Path) -> None:
    paint(folder / "before", "1.png", red=101, size=(300, 100))
    paint(folder / "before", "2.png", red=102, size=(32, 32))
    data = make(kind="reference_loose", minimum_image_size=50)
    sizes = {
        image.sample.path: image.references[0].sample.target_px for image in data.divided.trained[0].images
    }
    assert sizes["1.png"] == Size(32, 112)
    assert sizes["2.png"] == Size(64, 64)
    cropped = make(kind="reference_loose", entry={"crop": True, "crop_style": "center"})
    (reference,) = next(
        each.references for each in cropped.divided.trained[0].images if each.sample.path == "1.png"
    )
    assert cut(reference.sample) == (Size(64, 192), (0, 64), Size(64, 64))


def test_a_batch_of_loose_references_has_one_size(make: Make, folder: Path) -> None:
    for name in ("1", "2"):
        paint(folder / "before", f"{name}.png", red=100 + int(name), size=(300, 100))
    data = cached(make(kind="reference_loose"))
    names = sorted(name for name, _ in data._buckets)
    assert names == ["photos 64x64", "photos 64x64 + 112x32"]
    seen = set()
    for index in range(data.batches_per_epoch):
        found = batch(data, index)
        assert red(found.references[0]) == [each + 100 for each in red(found.latents)]
        seen.add(tuple(found.references[0].shape[-2:]))
    assert seen == {(8, 8), (4, 14)}


def test_the_bucket_of_strict_references_is_that_of_their_images() -> None:
    assert bucket_name(Size(64, 96), ()) == "96x64"
    assert bucket_name(Size(64, 96), [Size(64, 96)]) == "96x64"
    first = bucket_name(Size(64, 96), [Size(64, 96), Size(32, 32)])
    assert first == "96x64 + 96x64 + 32x32"
    assert bucket_name(Size(64, 96), [Size(32, 32), Size(64, 96)]) != first


def test_combined_references_stand_in_the_order_in_which_they_are_named(make: Make) -> None:
    for names in (("before", "sketch"), ("sketch", "before")):
        data = cached(make(*names, sampling="combined"))
        found = batch(data, 1)
        starts = {"before": 100, "sketch": 200}
        for name, latents in zip(names, found.references, strict=True):
            assert red(latents) == [each + starts[name] for each in red(found.latents)]


def draws(data: TrainingData, epochs: range) -> dict[tuple[int, int], set[str]]:
    """(image, epoch) -> the entries that its references come from."""
    drawn: dict[tuple[int, int], set[str]] = {}
    for epoch in epochs:
        for step in range(data.batches_per_epoch):
            found = batch(data, epoch * data.batches_per_epoch + step)
            assert len(found.references) == 1
            for image, reference in zip(red(found.latents), red(found.references[0]), strict=True):
                start = reference - image
                assert start in (100, 200)
                drawn.setdefault((image, epoch), set()).add({100: "before", 200: "sketch"}[start])
    return drawn


def test_random_draws_one_reference_for_each_image_and_epoch(make: Make) -> None:
    drawn = draws(cached(make("before", "sketch", repeats=2, batch_size=1)), range(8))
    assert len(drawn) == 4 * 8
    assert all(len(each) == 1 for each in drawn.values())
    entries = Counter(next(iter(each)) for each in drawn.values())
    assert min(entries.values()) > 5
    in_epoch = [{next(iter(drawn[image, epoch])) for image in range(4)} for epoch in range(8)]
    assert any(len(each) == 2 for each in in_epoch)  # each image has a draw of its own
    assert drawn == draws(cached(make("before", "sketch", repeats=2, batch_size=1)), range(8))
    assert drawn != draws(cached(make("before", "sketch", repeats=2, batch_size=1, seed=7)), range(8))


def test_references_of_several_sizes_are_drawn_for_the_bucket(make: Make, folder: Path) -> None:
    for name in NAMES:
        paint(folder / "sketch", f"{name}.png", red=200 + int(name[-1]), size=(300, 100))
    data = cached(make("before", "sketch", kind="reference_loose"))
    assert [name for name, _ in data._buckets] == ["photos 64x64 + 64x64 + 112x32"]
    drawn = draws(data, range(8))
    of_epoch = [{next(iter(drawn[image, epoch])) for image in range(4)} for epoch in range(8)]
    assert all(len(each) == 1 for each in of_epoch)
    assert {next(iter(each)) for each in of_epoch} == {"before", "sketch"}


@pytest.mark.parametrize("kind", ["reference_strict", "reference_loose"])
@pytest.mark.parametrize("sampling", ["random", "combined"])
def test_two_processes_and_a_resumed_run_see_the_references_of_one(
    make: Make, folder: Path, kind: str, sampling: str
) -> None:
    if kind == "reference_loose":
        paint(folder / "before", "1.png", red=101, size=(300, 100))
    options = {"kind": kind, "sampling": sampling}
    data = cached(make("before", "sketch", **options))
    halves = [
        cached(make("before", "sketch", batch_size=1, num_processes=2, process_index=process, **options))
        for process in range(2)
    ]
    whole = [next(iter(data.batches(start=index))) for index in range(8)]
    endless = data.batches(start=3)
    for index in range(8):
        both = [batch(each, index) for each in halves]
        columns = zip(*(each.references for each in both), strict=True)
        for one, several in zip(whole[index].references, columns, strict=True):
            assert torch.equal(one, torch.cat(several))
        if index >= 3:
            resumed = next(endless)
            for one, other in zip(whole[index].references, resumed.references, strict=True):
                assert torch.equal(one, other)


def test_a_mask_and_references_stand_on_one_image(make: Make, folder: Path) -> None:
    for name in NAMES:
        (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "masks" / f"{name}.png")
    masks = ConditioningConfig(id="masks", instance_data_dir=folder / "masks", conditioning_type="mask")
    found = batch(cached(make("before", "sketch", conditioning=[masks], sampling="combined")), 0)
    assert found.loss_mask is not None
    assert len(found.references) == 2


def test_pairs_that_do_not_fit_are_listed(make: Make, folder: Path) -> None:
    (folder / "before" / "in" / "0.png").unlink()
    paint(folder / "before", "1.bmp", red=0)
    paint(folder / "before", "2.png", red=0, size=(64, 32))
    with pytest.raises(DataError) as caught:
        make()
    for part in ("in/0.png", "1.png (1.bmp, 1.png)", "2.png (64x64, its reference 64x32)"):
        assert part in str(caught.value)
    assert "3.png" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        make(kind="reference_loose")
    assert "2.png" not in str(caught.value)


def test_two_images_of_one_name_do_not_share_a_reference(make: Make, folder: Path) -> None:
    (image,) = folder.rglob("photos/1.png")
    image.with_suffix(".webp").write_bytes(image.read_bytes())
    with pytest.raises(DataError, match=r"1 image has the reference of another .*: 1.png and 1.webp"):
        make()


def test_a_folder_of_fewer_references_is_an_error_that_lists_the_images(make: Make, folder: Path) -> None:
    for name in NAMES[1:]:
        (folder / "sketch" / f"{name}.png").unlink()
    with pytest.raises(DataError) as caught:
        make("before", "sketch")
    for name in NAMES[1:]:
        assert f"{name}.png" in str(caught.value)
    assert "in/0.png" not in str(caught.value)
    assert str(folder / "sketch") in str(caught.value)


@pytest.mark.parametrize("kind", ["reference_strict", "reference_loose"])
def test_validate_names_the_same_pairs_and_counts_the_same_buckets(
    make: Make, folder: Path, kind: str
) -> None:
    if kind == "reference_loose":
        paint(folder / "before", "1.png", red=0, size=(300, 100))
    data = make(kind=kind)

    def seen() -> object:
        return preview(
            data.datasets[0],
            data.data,
            alignment=16,
            seed=42,
            reads_all=True,
            conditioning=data.conditioning,
        )

    found = seen()
    assert found.conditioning_problem is None
    counts = {name.removeprefix("photos "): len(images) for name, images in data._buckets}
    assert dict(found.groups) == counts
    (folder / "before" / "2.png").unlink()
    with pytest.raises(DataError) as caught:
        make(kind=kind)
    assert str(caught.value) == seen().conditioning_problem


def test_a_damaged_reference_leaves_its_image_out_of_this_and_later_runs(make: Make, folder: Path) -> None:
    file = folder / "before" / "1.png"
    file.write_bytes(file.read_bytes()[:-40])
    for data in (cached(make()), make()):
        assert [(each.path, "before" in each.reason or "1.png" in each.reason) for each in data.skipped] == [
            ("1.png", True)
        ]
        assert "reference" in data.skipped[0].reason
        assert len(data.samples) == 3
    paint(folder / "before", "1.png", red=5)
    assert len(make().samples) == 4


def test_a_reference_that_is_no_image_leaves_its_image_out(make: Make, folder: Path) -> None:
    (folder / "before" / "1.png").write_bytes(b"no image")
    data = make()
    assert [each.path for each in data.skipped] == ["1.png"]
    assert "reference 1.png" in data.skipped[0].reason


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"kind": "reference_loose", "entry": {"crop": True, "crop_style": "corner"}}, True),
        ({"kind": "reference_loose", "entry": {"captions": "sharpen"}}, False),
        ({"resolution": 32}, False),
    ],
    ids=range(4),
)
def test_facts_tell_whether_references_changed(make: Make, change: dict[str, object], same: bool) -> None:
    key = "dataset photos, hash of all references"
    assert (make().facts()[key] == make(**change).facts()[key]) == same


def test_facts_tell_another_reference(make: Make, folder: Path) -> None:
    key = "dataset photos, hash of all references"
    before = make().facts()
    assert key not in make(conditioning_data=[]).facts()
    paint(folder / "before", "1.png", red=77)
    after = make().facts()
    assert [name for name in before if before[name] != after[name]] == [key]


def test_captions_of_the_drawn_reference_stand_for_those_of_the_image(make: Make) -> None:
    data = cached(make("before", entry={"captions": ["sharpen", "restore"]}))
    assert {"sharpen", "restore"} <= set(data.captions())
    drawn = Counter(each.caption for index in range(20) for each in batch(data, index).samples)
    assert drawn.keys() == {"sharpen", "restore"}
    assert min(drawn.values()) > 5


def test_a_cache_never_lies_among_the_references(make: Make, folder: Path) -> None:
    with pytest.raises(DataError, match="before"):
        make(cache_dir_vae=folder / "before" / "cache")

"""Disk space and main memory of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from simpletuner.helpers.estimating import disk as module
from simpletuner.helpers.estimating.disk import DiskNeed, disk_problems
from simpletuner.helpers.estimating.estimate import Estimate, estimate
from tests.unit.estimating.conftest import Example

GIB = 2**30
KLEIN = "flux2-klein-4b-tlora"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def needs(example: Example, tmp_path: Path, *overrides: str, name: str = KLEIN) -> dict[str, int]:
    own = [
        f"output_dir={tmp_path / 'out'}",
        f"cache_dir_vae={tmp_path / 'vae'}",
        f"cache_dir_text={tmp_path / 'text'}",
    ]
    found = estimate(example(name, *own, *overrides))
    assert found is not None
    return {need.name: need.num_bytes for need in found.disk}


def test_what_is_published_is_downloaded(example: Example, tmp_path: Path) -> None:
    found = needs(example, tmp_path)
    assert found["download"] / 1e9 == pytest.approx(2 * (3.88 + 4.02 + 0.084), rel=0.01)
    sdxl = needs(example, tmp_path, name="sdxl-tlora-paper")["download"]
    assert sdxl / 1e9 == pytest.approx(4 * (2.57 + 0.123 + 0.695 + 0.084), rel=0.01)
    half = needs(example, tmp_path, "variant=fp16", name="sdxl-tlora-paper")["download"]
    assert half == sdxl // 2


def test_files_in_the_hubs_cache_are_not_downloaded_again(
    example: Example, tmp_path: Path, hub: Path
) -> None:
    before = needs(example, tmp_path)["download"]
    blobs = hub / "models--black-forest-labs--FLUX.2-klein-base-4B" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "part").write_bytes(bytes(1000))
    assert needs(example, tmp_path)["download"] == before - 1000


def test_a_cache_without_links_counts_too(example: Example, tmp_path: Path, hub: Path) -> None:
    before = needs(example, tmp_path)["download"]
    snapshot = hub / "models--black-forest-labs--FLUX.2-klein-base-4B" / "snapshots" / "abc" / "vae"
    snapshot.mkdir(parents=True)
    (snapshot / "part").write_bytes(bytes(1000))
    (snapshot / "link").symlink_to(snapshot / "part")
    assert needs(example, tmp_path)["download"] == before - 1000


def test_a_denoiser_from_elsewhere_is_not_downloaded_with_the_model(example: Example, tmp_path: Path) -> None:
    swapped = needs(example, tmp_path, f"pretrained_transformer_model_name_or_path={tmp_path}")["download"]
    assert swapped / 1e9 == pytest.approx(2 * (4.02 + 0.084), rel=0.01)


def test_an_unknown_repository_counts_in_16_bits(example: Example, tmp_path: Path) -> None:
    sdxl = needs(example, tmp_path, name="sdxl-tlora-paper")["download"]
    other = "pretrained_model_name_or_path=someone/fine-tune"
    assert needs(example, tmp_path, other, name="sdxl-tlora-paper")["download"] == sdxl // 2


def test_a_local_model_needs_no_download(example: Example, tmp_path: Path) -> None:
    assert "download" not in needs(example, tmp_path, name="demo-lora")


def test_caches_follow_from_the_images(example: Example, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "b.PNG", "c-masklabel.png", "d.txt"):
        (images / name).touch()
    text = f'[{{"id": "cats", "instance_data_dir": "{images}", "caption_strategy": "filename"}}]'
    (tmp_path / "data.json").write_text(text)
    data = f"data_backend_config={tmp_path / 'data.json'}"
    found = needs(example, tmp_path, data)
    assert found["latents of cats"] == 2 * 4 * 32 * 128 * 128
    assert found["captions"] == 2 * 2 * 512 * 7680
    uncached = needs(example, tmp_path, data, "vae_cache_disable=true", "text_cache_disable=true")
    assert not {"latents of cats", "captions"} & uncached.keys()


def test_files_that_are_there_are_not_written_again(example: Example, tmp_path: Path) -> None:
    before = needs(example, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state").write_bytes(bytes(5000))
    assert needs(example, tmp_path)["checkpoints"] == before["checkpoints"] - 5000
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "shard").write_bytes(bytes(before["captions"]))
    assert "captions" not in needs(example, tmp_path)


def test_checkpoints_are_counted_with_the_one_that_replaces_the_oldest(
    example: Example, tmp_path: Path
) -> None:
    def of(*overrides: str) -> float:
        given = ("max_train_steps=1000", "checkpoint_step_interval=100")
        return needs(example, tmp_path, *given, *overrides)["checkpoints"]

    one = of("checkpoint_step_interval=0")
    assert of("checkpoints_total_limit=2") == pytest.approx(one * (3 * 4 + 2) / (4 + 2), rel=0.01)
    assert of("checkpoints_total_limit=0") == pytest.approx(one * (10 * 4 + 2) / (4 + 2), rel=0.01)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    needs = [DiskNeed("download", tmp_path / "a" / "b", 2 * GIB), DiskNeed("checkpoints", tmp_path, GIB)]
    assert disk_problems(needs) == []
    [problem] = disk_problems([*needs, DiskNeed("captions", tmp_path / "c", 1)])
    assert "3.0 GiB free" in problem
    assert "download 2.0, checkpoints 1.0" in problem


def test_main_memory_holds_what_the_device_does_not(example: Example) -> None:
    def host(*overrides: str) -> Estimate:
        found = estimate(example(KLEIN, *overrides))
        assert found is not None
        return found

    plain = host()
    assert plain.host["model while it is loaded"] == pytest.approx(2 * 4.02e9, rel=0.01)  # the text encoder
    offloaded = host("enable_group_offload=true").host
    assert offloaded["offloaded weights"] == pytest.approx(2 * 3.88e9 - 0.88e9, rel=0.02)
    assert (
        host("use_ema=true").host["EMA"]
        == host("use_ema=true", "ema_device=accelerator").phases[2].parts["EMA"]
    )
    assert plain.host_bytes == sum(plain.host.values())
    assert module.GIB == GIB

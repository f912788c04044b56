"""Runs from tar archives: the same to the last bit as from the folder into which they are unpacked."""

from __future__ import annotations

import signal
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.integration.tiny_runs import TinyRun, start, wait_for_steps

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig

STEPS = {"max_train_steps": 12, "checkpoint_step_interval": 2, "lr_scheduler": "constant_with_warmup"}
CROPS = {"crop": True, "crop_style": "random", "resolution": 32, "resolution_type": "pixel"}


def packed(files: list[Path], archive: Path) -> None:
    """Pack files, without their folder."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as opened:
        for file in files:
            opened.add(file, arcname=file.name)


@dataclass
class ShardRun(TinyRun):
    """A run on images and masks in archives, or in folders."""

    is_packed: bool = True

    def config(self, **overrides: object) -> RunConfig:
        """The configuration, with random crops, which depend on the names."""
        images, masks = self.folder / "images", self.folder / "masks"
        masks.mkdir(exist_ok=True)
        for index in range(self.num_images):
            Image.new("L", (64, 64), 80 * index + 40).save(masks / f"image{index}.png")
        places = {"pictures": str(images), "masks": str(masks)}
        if self.is_packed:
            shards = self.folder / "shards"
            files = sorted(images.iterdir())
            if not shards.exists():
                packed(files[:3], shards / "images-0.tar")
                packed(files[3:], shards / "images-1.tar")
                packed(sorted(masks.iterdir()), shards / "masks.tar")
            places = {"pictures": f"{shards}/images-{{0..1}}.tar", "masks": f"{shards}/masks.tar"}
        kind = {"type": "webdataset" if self.is_packed else "local"}
        datasets = [
            {"id": "pictures", "instance_data_dir": places["pictures"], "conditioning_data": "masks"} | CROPS,
            {"id": "masks", "instance_data_dir": places["masks"], "conditioning_type": "mask"},
        ]
        datasets = [each | kind for each in datasets]
        return super().config(**{"data_backend_config": datasets, **STEPS, **overrides})


@pytest.mark.reliability_row(1)
def test_run_from_archives_that_is_killed_ends_as_one_from_folders(tmp_path: Path) -> None:
    folders = ShardRun(tmp_path / "folders", is_packed=False)
    with folders.trainer() as trainer:
        trainer.run()
        expected = trainer.state_digest()
        facts = trainer.data.facts()
    run = ShardRun(tmp_path / "archives")
    process = start(run)
    wait_for_steps(run, 5, process=process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with run.trainer() as trainer:
        assert trainer.run() == 0
        assert trainer.state_digest() == expected
        assert trainer.data.facts() == facts
    assert run.log() == folders.log()
    assert sorted(each.name for each in (run.folder / "shards").iterdir()) == [
        "images-0.tar",
        "images-1.tar",
        "masks.tar",
    ]

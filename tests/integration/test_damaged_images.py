"""A run whose images turn out to be damaged while they are cached is the run without these images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.run_folder import RUN_MANIFEST_FILE
from tests.integration.tiny_runs import TinyRun

EPOCHS = {"max_train_steps": None, "num_train_epochs": 2, "checkpoint_step_interval": 1}


def damage(run: TinyRun, *indices: int) -> None:
    """Cut off the pixels of images."""
    for index in indices:
        file = run.folder / "images" / f"image{index}.png"
        file.write_bytes(file.read_bytes()[:9000])


@pytest.mark.reliability_row(13)
def test_a_run_with_a_damaged_image_is_the_run_without_it_and_goes_on_where_it_stopped(
    tmp_path: Path,
) -> None:
    without = TinyRun(tmp_path / "without", num_images=3, keys=EPOCHS)
    assert without.run() == 0
    run = TinyRun(tmp_path / "run", num_images=4, keys=EPOCHS)
    damage(run, 3)
    with run.trainer() as trainer:
        assert trainer.max_steps == 6
        assert [each.path for each in trainer.data.skipped] == ["image3.png"]
        step = trainer.optimizer_step

        def stop_after_two(*arguments: object) -> object:
            trainer.preemption.requested = trainer.progress.step == 1
            return step(*arguments)

        trainer.optimizer_step = stop_after_two
        assert trainer.run() == 75
    page = json.loads((run.output_dir / RUN_MANIFEST_FILE).read_text())
    assert [path for path, _ in page["datasets"][0]["skipped"]] == ["image3.png"]
    assert run.run() == 0
    assert run.log() == without.log()


def test_a_dataset_of_damaged_images_ends_the_run(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, num_images=2)
    damage(run, 0, 1)
    with pytest.raises(DataError, match=r"'pictures': no image .*damaged"), run.trainer():
        pass

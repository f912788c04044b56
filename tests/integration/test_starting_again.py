"""The same command once more: after going back to a checkpoint, after the end, after a failure."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.io.faults import at_crash_points
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, COMFYUI_FILE, EXIT_FILE, SUMMARY_FILE
from simpletuner.helpers.training.runs import is_finished
from tests.integration.test_resume import Killed
from tests.integration.test_validation import PICTURES
from tests.integration.tiny_runs import TinyRun

pytestmark = pytest.mark.usefixtures("shared_caches")

BACK = {
    "resume_from_checkpoint": "checkpoint-1",
    "checkpoints_total_limit": 1,
    "checkpoint_step_interval": 1,
    "learning_rate": 0.1,
}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path, keys={"lr_scheduler": "constant"})


@pytest.mark.reliability_row(1)
def test_run_that_goes_back_and_dies_again_and_again_ends_exactly(tmp_path: Path, run: TinyRun) -> None:
    whole = TinyRun(tmp_path / "whole", keys=run.keys)
    for each in (run, whole):
        each.run(max_train_steps=2, checkpoint_step_interval=1)
    with whole.trainer(**BACK) as trainer:
        trainer.run()
        expected = trainer.state_digest()
    for stage, times in (("folder.before_rename", 2), ("checkpoint.pruning", 1)):
        passed: list[str] = []

        def die(name: str, stage: str = stage, times: int = times, passed: list[str] = passed) -> None:
            passed.append(name)
            if passed.count(stage) == times:
                raise Killed

        with pytest.raises(Killed), at_crash_points(die):
            run.run(**BACK)
    with run.trainer(**BACK) as trainer:
        assert trainer.progress.step > 1, "it gets on"
        trainer.run()
        assert trainer.state_digest() == expected
    assert run.log() == whole.log()
    assert run.run(**BACK) == 0


def test_images_of_later_steps_are_removed_with_a_line_and_no_other_file_is(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    run.run(**PICTURES, disable_benchmark=True)
    later = run.output_dir / "validation" / "step-4"
    images = [file.name for file in later.iterdir()]
    assert len(images) == 2
    (later / "notes.txt").write_text("mine")
    (later / "favourite.png").write_bytes(b"mine")
    (run.output_dir / "validation" / "step-6").mkdir()
    caplog.clear()
    back = {**PICTURES, "disable_benchmark": True, "resume_from_checkpoint": "checkpoint-2"}
    with caplog.at_level(logging.INFO), run.trainer(**back) as trainer:
        trainer.validation.start(2)
    assert sorted(file.name for file in later.iterdir()) == ["favourite.png", "notes.txt"]
    assert not (run.output_dir / "validation" / "step-6").exists()
    assert f"2 images of {later}" in caplog.text
    assert "step-6" in caplog.text


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flip, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", [ADAPTER_FILE, COMFYUI_FILE])
def test_finished_run_writes_a_lost_or_damaged_adapter_again(
    finished: TinyRun, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], name: str
) -> None:
    file = finished.output_dir / name
    before = file.read_bytes()
    damage(file)
    assert not is_finished(finished.config())
    with caplog.at_level(logging.WARNING):
        assert finished.run() == 0
    assert file.read_bytes() == before
    assert name in caplog.text
    assert "checkpoint-4" in caplog.text
    assert is_finished(finished.config())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of 4 steps that has reached its end."""
    run = TinyRun(tmp_path_factory.mktemp("finished"), keys={"lora_format": "comfyui"})
    assert run.run() == 0
    return run


def test_finished_run_of_an_earlier_version_writes_a_lost_adapter_again(finished: TinyRun) -> None:
    summary = finished.output_dir / SUMMARY_FILE
    content = json.loads(summary.read_bytes())
    content.pop("files")
    summary.write_text(json.dumps(content))
    assert is_finished(finished.config())
    (finished.output_dir / ADAPTER_FILE).unlink()
    assert not is_finished(finished.config())
    assert finished.run() == 0
    assert is_finished(finished.config())
    assert json.loads(summary.read_bytes())["files"]


def test_run_that_begins_has_no_end_of_the_run_before(run: TinyRun) -> None:
    run.run(max_train_steps=1)
    exit_file, summary = run.output_dir / EXIT_FILE, run.output_dir / SUMMARY_FILE
    exit_file.write_text('{"exit_code": 1, "outcome": "failed"}')
    assert summary.exists()
    with run.trainer(max_train_steps=2):
        assert not exit_file.exists()
        assert not summary.exists()


def test_run_that_does_not_begin_keeps_the_end_of_the_run_before(run: TinyRun) -> None:
    run.run(max_train_steps=1)
    before = (run.output_dir / SUMMARY_FILE).read_bytes()
    assert run.run(max_train_steps=1) == 0
    assert (run.output_dir / SUMMARY_FILE).read_bytes() == before


def test_changes_since_the_checkpoint_are_logged_and_marked_in_the_report(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    run.run(max_train_steps=2)
    (run.folder / "images" / "image0.txt").write_text("another caption")
    flip_pixel(run.folder / "images" / "image1.png")
    with caplog.at_level(logging.WARNING):
        run.run(seed=8, learning_rate=0.5, gradient_accumulation_steps=2, resolution=128)
    changed = [line.getMessage() for line in caplog.records if "Changed since step 2" in line.getMessage()]
    keys = {line.partition(": ")[2].partition(":")[0] for line in changed}
    assert keys == {
        "seed",
        "learning_rate",
        "gradient_accumulation_steps",
        "resolution",
        "max_train_steps",
        "dataset pictures, resolution",
        "dataset pictures, hash of all images",
        "dataset pictures, hash of all captions",
    }
    page = (run.output_dir / "report.html").read_text()
    assert "After step 2" in page
    assert "learning_rate: 0.001 before, 0.5 now" in page
    assert 'class="mark"' in page


def test_start_without_changes_logs_none(run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    run.run()
    for image in (run.folder / "images").iterdir():
        os.utime(image)
    with caplog.at_level(logging.WARNING), run.trainer(resume_from_checkpoint="checkpoint-2"):
        pass
    assert "leaves checkpoint-4" in caplog.text
    assert "Changed since" not in caplog.text


def flip_pixel(file: Path) -> None:
    with Image.open(file) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(file)

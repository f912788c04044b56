"""Trackers: the local log above all, and that none of them can end a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.sections import TrackingConfig
from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.reporting.trackers import JsonLines, Trackers, build_trackers

RECORD = StepMetrics(
    step=1,
    epoch=0,
    loss=0.5,
    lr=1e-4,
    grad_norm=2.0,
    mean_active_rank=None,
    samples=2,
    seconds=0.1,
    loss_by_band={"0-500": 0.5, "500-800": None, "800-1000": None},
    memory_mib=100.0,
    device_memory_mib=None,
)


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()]


def log_steps(file: Path, steps: range, *, resumed_step: int) -> None:
    tracker = JsonLines(file, resumed_step=resumed_step)
    tracker.start()
    for step in steps:
        tracker.log(replace(RECORD, step=step))


def test_json_lines_hold_one_object_for_each_step(tmp_path: Path) -> None:
    log_steps(tmp_path / "m.jsonl", range(1, 3), resumed_step=0)
    lines = (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "step": 1,
        "epoch": 0,
        "loss": 0.5,
        "lr": 1e-4,
        "grad_norm": 2.0,
        "mean_active_rank": None,
        "samples": 2,
        "seconds": 0.1,
        "loss_by_band": {"0-500": 0.5, "500-800": None, "800-1000": None},
        "memory_mib": 100.0,
        "device_memory_mib": None,
    }
    assert steps_in(tmp_path / "m.jsonl") == [1, 2]


def test_json_lines_of_a_resumed_run_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    log_steps(file, range(1, 6), resumed_step=0)
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"step": 6, "lo')
    log_steps(file, range(4, 7), resumed_step=3)
    assert steps_in(file) == [1, 2, 3, 4, 5, 6]


def test_json_lines_of_a_new_run_begin_anew(tmp_path: Path) -> None:
    log_steps(tmp_path / "m.jsonl", range(1, 6), resumed_step=0)
    log_steps(tmp_path / "m.jsonl", range(1, 2), resumed_step=0)
    assert steps_in(tmp_path / "m.jsonl") == [1]


class Raising:
    """A tracker whose every call fails, as one without a connection does."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self) -> None:
        """Nothing to open."""

    def log(self, record: StepMetrics) -> None:
        """Fail."""
        self.calls += 1
        raise ConnectionError("no route to host")

    def log_images(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Fail."""
        raise ConnectionError("no route to host")

    def finish(self) -> None:
        """Nothing to close."""


def test_row_24_tracker_that_raises_is_dropped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raising = Raising()
    trackers = Trackers([raising, JsonLines(tmp_path / "m.jsonl", resumed_step=0)])
    with caplog.at_level(logging.WARNING):
        trackers.start()
        for step in (1, 2, 3):
            trackers.log(replace(RECORD, step=step))
        trackers.finish()
    assert raising.calls == 1
    assert caplog.text.count("no route to host") == 1
    assert steps_in(tmp_path / "m.jsonl") == [1, 2, 3]


def picture(folder: Path) -> Path:
    file = folder / "grid.png"
    Image.new("RGB", (8, 8), "red").save(file)
    return file


def test_tensorboard_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(report_to="tensorboard")
    trackers = build_trackers(config, output_dir=tmp_path, settings={}, resumed_step=0)
    trackers.start()
    trackers.log(RECORD)
    trackers.log_images(1, {"grid": picture(tmp_path)})
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [0.5]
    assert [event.value for event in events.Scalars("train/loss_0-500")] == [0.5]
    assert "train/loss_500-800" not in events.Tags()["scalars"]
    assert [event.value for event in events.Scalars("train/memory_mib")] == [100.0]
    assert events.Tags()["images"] == ["validation/grid"]


def test_wandb_offline_keeps_its_run_over_a_restart(tmp_path: Path) -> None:
    config = TrackingConfig(report_to="wandb")
    ids = []
    for step in (1, 2):
        trackers = build_trackers(config, output_dir=tmp_path, settings={"a": 1}, resumed_step=step - 1)
        trackers.start()
        trackers.log(replace(RECORD, step=step))
        trackers.log_images(step, {"grid": picture(tmp_path)})
        trackers.finish()
        ids.append(json.loads((tmp_path / "wandb_run.json").read_bytes())["id"])
    assert ids[0] == ids[1]
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))


def test_tracker_whose_package_is_missing_is_an_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"simpletuner-t\[track\]"):
        build_trackers(
            TrackingConfig(report_to="tensorboard"), output_dir=tmp_path, settings={}, resumed_step=0
        )

"""Trackers: the local log above all, and that none of them can end or delay a run."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.sections import TrackingConfig
from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.io.run_folder import EVALUATIONS_FILE
from simpletuner.helpers.reporting import trackers as trackers_module
from simpletuner.helpers.reporting.evaluations import EvaluationMetrics, evaluated_steps, lowest_held_out
from simpletuner.helpers.reporting.metrics import StepMetrics
from simpletuner.helpers.reporting.trackers import JsonLines, Trackers, build_trackers

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

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


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


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
        "prior_loss": None,
        "lr": 1e-4,
        "lr_by_group": None,
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


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether the disk is full: a file then takes three bytes of each write, as the last block may."""
    is_full, then = False, Path.open

    class Full(io.FileIO):
        def write(self, data: Buffer) -> int:
            if is_full:
                super().write(bytes(data)[:3])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return io.BufferedWriter(Full(path, "a")) if mode == "ab" else then(path, mode, **options)

    def switch(full: bool) -> None:
        nonlocal is_full
        is_full = full

    monkeypatch.setattr(Path, "open", opened)
    return switch


@pytest.mark.reliability_row(5)
def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full_disk: Callable[[bool], None]
) -> None:
    file = tmp_path / "m.jsonl"
    tracker = JsonLines(file, resumed_step=0)
    tracker.start()
    for step in range(1, 11):
        full_disk(4 <= step < 8)
        tracker.log(replace(RECORD, step=step))
    tracker.finish()
    assert steps_in(file) == [*range(1, 11)]
    (warning,) = warnings_in(caplog)
    assert "No space left" in warning


@pytest.mark.reliability_row(5)
def test_log_of_a_disk_that_stays_full_says_how_many_steps_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full_disk: Callable[[bool], None]
) -> None:
    tracker = JsonLines(tmp_path / "m.jsonl", resumed_step=0)
    tracker.start()
    tracker.log(RECORD)
    full_disk(True)
    for step in range(2, 5):
        tracker.log(replace(RECORD, step=step))
    tracker.finish()
    assert "the last 3 rows" in warnings_in(caplog)[-1]


@pytest.mark.reliability_row(5)
def test_rows_wait_while_the_disk_is_too_full_to_remove_later_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.jsonl"
    log_steps(file, range(1, 6), resumed_step=0)
    tracker = JsonLines(file, resumed_step=3)

    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(trackers_module, "write_text", refuse)
        tracker.start()
        tracker.log(replace(RECORD, step=4))
    tracker.log(replace(RECORD, step=5))
    assert steps_in(file) == [1, 2, 3, 4, 5]


class Counting:
    """A tracker that counts its calls; one kind of call does something else too."""

    def __init__(self, *, at: str = "", act: Callable[[], object] = bool) -> None:
        self.calls: list[str] = []
        self.rows: list[int] = []
        self.at, self.act = at, act

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            self.act()

    def start(self) -> None:
        """Open it."""
        self._call("start")

    def log(self, record: StepMetrics) -> None:
        """Take a row."""
        self._call("log")
        self.rows.append(record.step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Take images."""
        self._call("log_images")

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        self._call("log_scores")

    def finish(self) -> None:
        """Close it."""
        self._call("finish")


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def end_of(released: Event) -> None:
    """Let the threads of trackers that hang end."""
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("tracker "):
            thread.join()


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), SystemExit("no route"), KeyboardInterrupt("no route")]
)
@pytest.mark.parametrize("at", ["start", "log", "log_images", "finish"])
@pytest.mark.reliability_row(24)
def test_tracker_that_raises_is_dropped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException, at: str
) -> None:
    failing, other = Counting(at=at, act=raising(error)), Counting()
    trackers = Trackers(JsonLines(tmp_path / "m.jsonl", resumed_step=0), [failing, other])
    with trackers:
        for step in (1, 2, 3):
            trackers.log(replace(RECORD, step=step))
            trackers.log_images(step, {})
    assert failing.calls.count(at) == 1
    (warning,) = warnings_in(caplog)
    assert "Counting" in warning
    assert "no route" in warning
    assert steps_in(tmp_path / "m.jsonl") == other.rows == [1, 2, 3]
    assert other.calls == ["start", *["log", "log_images"] * 3, "finish"]


@pytest.mark.parametrize("at", ["start", "log", "finish"])
@pytest.mark.reliability_row(24)
def test_tracker_that_hangs_delays_neither_a_step_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    released = Event()

    def hang_and_fail() -> None:
        released.wait()
        raise ConnectionError("no news")

    hanging = Counting(at=at, act=hang_and_fail)
    trackers = Trackers(JsonLines(tmp_path / "m.jsonl", resumed_step=0), [hanging], timeout_s=0.1)
    started_s = time.monotonic()
    with trackers:
        for step in (1, 2, 3):
            trackers.log(replace(RECORD, step=step))
    assert time.monotonic() - started_s < 5
    (thread,) = [each for each in threading.enumerate() if each.name == "tracker Counting"]
    assert thread.daemon, "it must not keep the process alive"
    (warning,) = warnings_in(caplog)
    assert ("0 rows" if at == "finish" else "3 rows") in warning
    assert steps_in(tmp_path / "m.jsonl") == [1, 2, 3]
    end_of(released)
    assert warnings_in(caplog) == [warning], "the later error of an abandoned thread is no news"


@pytest.mark.reliability_row(24)
def test_all_trackers_that_hang_share_the_wait_at_the_end() -> None:
    released = Event()
    trackers = Trackers(None, [Counting(at="start", act=released.wait) for _ in range(8)], timeout_s=0.5)
    trackers.start()
    started_s = time.monotonic()
    trackers.finish()
    assert 0.5 <= time.monotonic() - started_s < 2
    end_of(released)


@pytest.mark.reliability_row(24)
def test_slow_tracker_loses_validations_first_then_its_oldest_rows_and_one_warning_counts_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    released = Event()
    slow = Counting(at="start", act=released.wait)
    trackers = Trackers(None, [slow])
    trackers.start()
    trackers.log_images(0, {})
    for step in range(1, 1001):
        trackers.log(replace(RECORD, step=step))
    for step in range(1001, 1004):
        trackers.log_images(step, {})
        trackers.log(replace(RECORD, step=step))
    released.set()
    trackers.finish()
    assert slow.rows == [*range(4, 1004)]
    assert "log_images" not in slow.calls
    (warning,) = warnings_in(caplog)
    assert "3 rows" in warning
    assert "4 validations" in warning


def test_stopped_run_waits_less_for_its_trackers() -> None:
    released = Event()
    trackers = Trackers(None, [Counting(at="start", act=released.wait)], timeout_s=100)
    trackers.start()
    trackers.limit_wait(0.1)
    trackers.finish()
    end_of(released)


def test_wait_at_the_end_is_that_of_the_configuration(tmp_path: Path) -> None:
    config = TrackingConfig(tracker_timeout_seconds=7)
    assert build_trackers(config, output_dir=tmp_path, settings={}, resumed_step=0)._timeout_s == 7


def test_tracker_that_is_merely_behind_gets_every_row(caplog: pytest.LogCaptureFixture) -> None:
    behind = Counting(at="log", act=lambda: time.sleep(0.01))
    with Trackers(None, [behind]) as trackers:
        for step in range(1, 11):
            trackers.log(replace(RECORD, step=step))
    assert behind.rows == [*range(1, 11)]
    assert not warnings_in(caplog)


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
    hide("my secret", "{env:KEY}")
    config = TrackingConfig(
        report_to="wandb", tracker_run_name="run of my secret", tracker_project_name="my secret"
    )
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
    files = [file.read_bytes() for file in (tmp_path / "wandb").rglob("*") if file.is_file()]
    assert any(b"run of {env:KEY}" in content for content in files)
    assert not any(b"my secret" in content for content in files)


@pytest.fixture
def trackio_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackio's folder; its modules read the variable when they are imported."""
    pytest.importorskip("trackio")
    for name in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


def test_trackio_keeps_its_run_over_a_restart(trackio_store: Path, tmp_path: Path) -> None:
    config = TrackingConfig(report_to="trackio", tracker_project_name="toy", tracker_run_name="one")
    for output, step in (("a", 1), ("a", 2), ("b", 1)):
        trackers = build_trackers(
            config, output_dir=tmp_path / output, settings={"lr": 1}, resumed_step=step - 1
        )
        trackers.start()
        trackers.log(replace(RECORD, step=step))
        trackers.log_images(step, {"grid": picture(tmp_path)})
        trackers.finish()
    with closing(sqlite3.connect(trackio_store / "toy.db")) as store:
        rows = store.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    losses = [(run, step) for run, step, metrics in rows if json.loads(metrics).get("train/loss") == 0.5]
    assert [step for _, step in losses] == [1, 2, 1]
    assert losses[0][0] == losses[1][0] != losses[2][0], "another output folder is another run"
    assert len(list((trackio_store / "media").rglob("*.png"))) == 3


def test_tracker_whose_package_is_missing_is_an_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"simpletuner-t\[track\]"):
        build_trackers(
            TrackingConfig(report_to="tensorboard"), output_dir=tmp_path, settings={}, resumed_step=0
        )


def evaluation(step: int) -> EvaluationMetrics:
    return EvaluationMetrics(
        step=step,
        eval_loss=0.5,
        eval_train_loss=0.25,
        eval_loss_by_band={"0-500": 0.5},
        eval_train_loss_by_band={"0-500": None},
        images=2,
        image_set=7,
        train_images=2,
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("resumed", "kept"), [(0, []), (2, [0, 2]), (3, [0, 2]), (9, [0, 2, 4])], ids=range(4)
)
def test_evaluations_of_later_steps_are_removed_and_those_of_another_run_all(
    tmp_path: Path, resumed: int, kept: list[int]
) -> None:
    options = {"output_dir": tmp_path, "settings": {}}
    file = tmp_path / "evaluations.jsonl"
    with build_trackers(TrackingConfig(), **options, resumed_step=0, evaluates=True) as trackers:
        for step in (0, 2, 4):
            trackers.log_evaluation(evaluation(step))
    with build_trackers(TrackingConfig(), **options, resumed_step=resumed):
        assert steps_in(file) == kept


def test_a_run_without_held_out_images_has_no_log_of_evaluations(tmp_path: Path) -> None:
    with build_trackers(TrackingConfig(), output_dir=tmp_path, settings={}, resumed_step=0):
        assert not (tmp_path / "evaluations.jsonl").exists()


def test_trackers_get_the_losses_of_an_evaluation_as_scores(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    class Scores:
        def start(self) -> None: ...
        def finish(self) -> None: ...
        def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
            seen.append((step, dict(scores)))

    with Trackers(None, [Scores()]) as trackers:
        trackers.log_evaluation(evaluation(4))
    losses = {"eval_loss": 0.5, "eval_train_loss": 0.25, "eval_gap": 0.25, "eval_loss_0-500": 0.5}
    assert seen == [(4, losses)]


def test_lowest_loss_of_held_out_images_is_named(tmp_path: Path) -> None:
    assert lowest_held_out(tmp_path) is None
    rows = [replace(evaluation(step), eval_loss=loss) for step, loss in ((0, 0.5), (2, 0.25), (4, 0.75))]
    with build_trackers(
        TrackingConfig(), output_dir=tmp_path, settings={}, resumed_step=0, evaluates=True
    ) as trackers:
        for row in (*rows, replace(rows[0], step=5, eval_loss=None)):
            trackers.log_evaluation(row)
        assert lowest_held_out(tmp_path) == "lowest loss 0.25000 at step 2 of 3 evaluations; last 0.75000"
        trackers.log_evaluation(replace(rows[0], step=6, eval_loss=0.875, image_set=8))
        trackers.log_evaluation(replace(rows[0], step=8, eval_loss=0.625, image_set=8))
    found = "lowest loss 0.62500 at step 8 of 2 evaluations of the present held-out images; last 0.62500"
    assert lowest_held_out(tmp_path) == found
    assert evaluated_steps(tmp_path) == {0, 2, 4, 5, 6, 8}
    file = tmp_path / EVALUATIONS_FILE
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"image_set": None}) + "\n" for line in lines[:3]))
    assert lowest_held_out(tmp_path) == "lowest loss 0.25000 at step 2 of 3 evaluations; last 0.75000"

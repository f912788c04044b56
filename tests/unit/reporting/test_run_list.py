"""The list of runs, and how the commands find one and say that they do not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from simpletuner import cli
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.reporting.run_list import find_run, is_run, list_runs, table
from simpletuner.helpers.reporting.run_state import NoRunError, read_status, save_progress
from tests.integration.synthetic_run import SyntheticRun


def written(folder: Path, *, age_s: float = 0.0, exit_outcome: str | None = None) -> Path:
    """A run that ended at step 50 of 100."""
    run = SyntheticRun(folder, validations=0, prompts=())
    run.write()
    if exit_outcome is not None:
        run.json("exit.json", {"outcome": exit_outcome})
    save_progress(folder, step=50, left_s=3725.0)
    os.utime(folder / "progress.json", (time.time() - age_s,) * 2)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["simpletuner", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_runs_are_listed_by_their_last_news_and_checkpoints_are_none(tmp_path: Path) -> None:
    written(tmp_path / "old", age_s=7300, exit_outcome="stopped, the same command goes on")
    new = written(tmp_path / "group" / "新しい実行", age_s=60)
    checkpoint = tmp_path / "old" / "checkpoint-50"
    checkpoint.mkdir()
    for name in ("config.resolved.json", "manifest.json"):
        (checkpoint / name).write_text("{}")
    written(tmp_path / "a" / "b" / "c" / "too deep")
    grid = new / "validation" / "step-40" / "grid.png"
    grid.parent.mkdir(parents=True)
    grid.touch()
    (new / "validation" / "step-50").mkdir()  # its images are being made
    with run_lock(new):
        lines = table(list_runs(tmp_path), below=tmp_path)
    cells = [[cell for cell in line.split("  ") if cell] for line in lines]
    assert [[each.strip() for each in line] for line in cells] == [
        ["RUN", "STATE", "STEP", "LEFT", "LAST NEWS", "LAST GRID"],
        [str(Path("group/新しい実行")), "running", "50 of 100", "1 h 2 min", "1 min 0 s ago", str(grid)],
        ["old", "stopped", "50 of 100", "2 h 1 min ago"],
    ]
    states = zip(lines, ("STATE", "running"), strict=False)
    widths = {cell_len(line[: line.index(state)]) for line, state in states}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("outcome", "state"),
    [(None, "died"), ("failed", "failed"), ("stopped, the same command goes on", "stopped")],
)
def test_ended_run_has_a_state_and_no_time_left(tmp_path: Path, outcome: str | None, state: str) -> None:
    status = read_status(written(tmp_path, exit_outcome=outcome))
    assert (status.state, status.left_s) == (state, None)


def test_run_of_an_earlier_version_is_at_its_newest_checkpoint(tmp_path: Path) -> None:
    SyntheticRun(tmp_path, validations=0, prompts=()).write()
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "run.json").unlink()
    status = read_status(tmp_path)
    assert (status.step, status.max_steps) == (30, None)
    assert table([status], below=tmp_path)[1].split()[:3] == [".", "died", "30"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"step": "x", "left_s": "y"}',
        b"\x00" * 30,
        b'{"step": true, "left_s": NaN}',
        b'{"step": -3, "left_s": -5}',
        b'{"step": 0, "left_s": Infinity}',
        b"[" * 100_000,
    ],
    ids=range(8),
)
def test_damaged_progress_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    (written(tmp_path) / "progress.json").write_bytes(content)
    with run_lock(tmp_path):
        status = read_status(tmp_path)
    assert (status.state, status.step, status.left_s) == ("running", 0, None)


def test_run_that_is_deleted_while_it_is_listed_costs_nothing(tmp_path: Path) -> None:
    status = read_status(tmp_path / "gone")
    assert (status.state, status.step, status.grid) == ("died", 0, None)


def test_progress_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "progress.json").mkdir()
    (tmp_path / "progress.json" / "in the way").touch()
    save_progress(tmp_path, step=1, left_s=None)
    assert (tmp_path / "progress.json").is_dir()


def test_run_is_found_by_its_folder_or_its_name_below_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = written(Path("output/実行"))
    assert find_run(Path("実行")) == run
    assert find_run(tmp_path / run) == tmp_path / run
    assert not is_run(Path("output"))


def test_run_that_has_only_begun_is_found(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        assert find_run(tmp_path) == tmp_path


@pytest.mark.parametrize("arguments", [("report",), ("ask", "stop")], ids=["report", "ask"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "Did you mean mine2?"),
        ("output", "holds neither metrics.jsonl nor config.resolved.json"),
        ("a file", "holds neither"),
        ("line\nbreak", "no such folder"),
        ("x" * 300, "no folder has so long a name"),
    ],
)
def test_what_is_no_run_is_named_with_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    name: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("output/mine2"))
    Path("a file").touch()
    assert command(monkeypatch, arguments[0], name, *arguments[1:]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Give the output_dir of a run" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("request_", "state"),
    [("dance", None), ("save", "died"), ("stop", "finished")],
    ids=["unknown", "died", "finished"],
)
def test_run_that_does_not_go_on_is_not_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request_: str,
    state: str | None,
) -> None:
    run = written(tmp_path)
    if state == "finished":
        (run / "finished.json").write_text(json.dumps({"step": 50}))
    assert command(monkeypatch, "ask", run, request_) == (1 if state else 2)
    error = capsys.readouterr().err
    assert (f"no run is going on there; {state} at step 50." if state else "'dance'") in error
    assert not (run / "requests").exists()


def test_folder_without_runs_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "runs", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no runs there.\n"
    with pytest.raises(NoRunError, match="no such folder"):
        list_runs(tmp_path / "missing")
    assert command(monkeypatch, "runs", tmp_path / "missing") == 1

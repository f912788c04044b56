"""Runs that are asked for images, a checkpoint or their end while they go on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from simpletuner import cli, train
from simpletuner.helpers.checkpointing import requests
from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED, LAUNCH_DIR
from simpletuner.helpers.checkpointing.requests import ask
from simpletuner.helpers.reporting.run_list import list_runs
from simpletuner.helpers.reporting.run_state import read_status
from tests.integration.test_validation import PICTURES
from tests.integration.tiny_runs import TinyRun, start, start_pair, wait_for_steps

ENDLESS: dict[str, object] = {"max_train_steps": 100_000, "checkpoint_step_interval": 0}
ON_REQUEST = {**PICTURES, "validation_step_interval": 0, "disable_benchmark": True}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path / "asked")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["simpletuner", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.xdist_group("processes")
def test_run_that_goes_on_is_asked_by_commands(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(run, **{**ENDLESS, **ON_REQUEST})
    wait_for_steps(run, 3, process=process)
    assert command(monkeypatch, "ask", run.output_dir, "sample") == 0, process.errors()
    step, grid = capsys.readouterr().out.removeprefix("Images of step ").strip().split(": ")
    assert Path(grid).is_file()
    assert f"step {step}" in (run.output_dir / "report.html").read_text()
    assert command(monkeypatch, "runs", run.folder) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("output  running  ")
    assert line.endswith(grid)
    assert " of 100,000 " in line
    assert command(monkeypatch, "ask", run.output_dir, "stop") == 0
    assert "and the run stops" in capsys.readouterr().out
    assert process.wait() == EXIT_PREEMPTED, process.errors()
    last = len(run.log())
    assert (run.output_dir / f"checkpoint-{last}").is_dir()
    assert not list((run.output_dir / "requests").iterdir())
    assert f"stopped at step {last} of" in (run.output_dir / "report.html").read_text()
    assert command(monkeypatch, "ask", run.output_dir, "save") == 1
    assert f"no run is going on there; died at step {last}" in capsys.readouterr().err


@pytest.mark.xdist_group("processes")
def test_two_processes_act_alike_on_two_requests_at_once(run: TinyRun) -> None:
    main, other = start_pair(run, **{**ENDLESS, **ON_REQUEST})
    wait_for_steps(run, 2, process=main)
    ask(run.output_dir, "sample", is_waiting=False)
    assert "is saved" in ask(run.output_dir, "save")
    ask(run.output_dir, "stop")
    assert [each.wait() for each in (main, other)] == [EXIT_PREEMPTED] * 2, main.errors()
    last = len(run.log())
    assert (run.output_dir / f"checkpoint-{last}").is_dir(), main.errors()
    assert len(list(run.output_dir.glob("validation/step-*/grid.png"))) == 1
    assert run.log()[-1]["samples"] == 2 * last


def test_asked_run_ends_as_one_that_nobody_asked(run: TinyRun, tmp_path: Path) -> None:
    digests = []
    for each, wanted in ((run, ("sample", "save")), (TinyRun(tmp_path / "left alone"), ())):
        with each.trainer(checkpoint_step_interval=0, **ON_REQUEST) as trainer:
            for request in wanted:
                ask(each.output_dir, request, is_waiting=False)
            assert trainer.run() == 0
            digests.append(trainer.state_digest())
    assert digests[0] == digests[1]
    assert (run.output_dir / "checkpoint-1").is_dir()
    assert (run.output_dir / "validation" / "step-1" / "grid.png").is_file()


def test_images_of_the_last_step_are_those_of_its_end(run: TinyRun) -> None:
    with run.trainer(max_train_steps=1, **ON_REQUEST) as trainer:
        ask(run.output_dir, "sample", is_waiting=False)
        assert trainer.run() == 0
    assert (run.output_dir / "validation" / "step-1" / "grid.png").is_file()


@pytest.mark.parametrize("wanted", [("sample",), ("sample", "stop")], ids=["no prompts", "it stops"])
def test_run_says_why_it_generates_no_images(
    run: TinyRun, wanted: tuple[requests.Request, ...], caplog: pytest.LogCaptureFixture
) -> None:
    keys = ON_REQUEST if "stop" in wanted else {}
    with run.trainer(**keys) as trainer, caplog.at_level(logging.INFO):
        for request in wanted:
            ask(run.output_dir, request, is_waiting=False)
        assert trainer.run() == (EXIT_PREEMPTED if "stop" in wanted else 0)
    reason = "No images of step 1: the run stops." if keys else "generates no validation images"
    assert reason in caplog.text
    assert (run.output_dir / "checkpoint-1").is_dir() is bool(keys)


def test_request_to_a_dead_run_does_not_stop_the_next_one(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    ask(run.output_dir, "stop", is_waiting=False)
    with caplog.at_level(logging.INFO):
        assert run.run(max_train_steps=2) == 0
    assert "Removed 1 request to an earlier run" in caplog.text


def test_launch_that_was_asked_to_stop_ends_with_code_75(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_DIR, str(tmp_path))
    assert train._failed_elsewhere(EXIT_PREEMPTED) == 1, "the launcher stopped it"
    with run.trainer() as trainer:
        ask(run.output_dir, "stop", is_waiting=False)
        assert trainer.run() == EXIT_PREEMPTED
    assert train._failed_elsewhere(EXIT_PREEMPTED) == EXIT_PREEMPTED


def test_finished_run_is_listed_with_its_last_step(run: TinyRun) -> None:
    assert run.run(max_train_steps=2) == 0
    (status,) = list_runs(run.folder)
    assert (status.state, status.step, status.max_steps, status.left_s) == ("finished", 2, 2, None)
    assert json.loads((run.output_dir / "progress.json").read_bytes())["step"] == 2
    (run.output_dir / "progress.json").write_bytes(b"\0" * 20)  # after a power cut
    assert read_status(run.output_dir).step == 2

"""The three-minute form of `simpletuner benchmark tlora`, as it is run on every change."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.demo.comparison.plan import QUICK

pytestmark = [
    pytest.mark.timeout(900),  # a busy machine takes long; what is promised is checked in CPU time
    pytest.mark.xdist_group("comparison"),  # one worker makes what these tests share, once
]
PROMISED_S = 180


def benchmark(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simpletuner", "benchmark", "tlora", "--size", "quick"]
    command += ["--workers", "2", "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("comparison")
    before_s = cpu_s_of_children()
    done = benchmark(output)
    assert done.returncode == 0, done.stderr
    assert cpu_s_of_children() - before_s < PROMISED_S, "three minutes, even with one worker"
    return output, done.stderr


def cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_quick_form_trains_and_measures_every_contender_and_says_how_long_it_takes(
    finished: tuple[Path, str],
) -> None:
    output, said = finished
    names = [contender.name for contender in QUICK.contenders]
    records = [json.loads(file.read_bytes()) for file in (output / "results").glob("*rank*.json")]
    assert sorted(record["run"]["contender"]["name"] for record in records) == sorted(names)
    for record in records:
        assert [point["step"] for point in record["points"]] == [0, *QUICK.steps]
        assert len({json.dumps(point["loss"]) for point in record["points"]}) == 1 + len(QUICK.steps)
        assert record["points"][0]["alignment"] > 0.5, "the embedded model follows prompts"
    assert f"1 of {len(names)}" in said
    assert "left" in said


def test_every_contender_ends_elsewhere(finished: tuple[Path, str]) -> None:
    files = (finished[0] / "results").glob("*rank*.json")
    last = [json.loads(file.read_bytes())["points"][-1]["loss"] for file in files]
    assert len({json.dumps(each) for each in last}) == len(last)


def test_report_and_plot_name_every_contender_and_nothing_else_is_left(finished: tuple[Path, str]) -> None:
    output, _ = finished
    report, plot = (output / "report.md").read_text(), (output / "trade-off.svg").read_text()
    for contender in QUICK.contenders:
        assert f"| {contender.name} |" in report
        assert contender.name in plot
    assert (output / "trade-off.png").stat().st_size > 5000
    assert not list((output / "runs").iterdir())


def test_a_second_start_does_only_what_is_missing(finished: tuple[Path, str]) -> None:
    output, _ = finished
    files = sorted((output / "results").glob("*rank*.json"))
    kept, removed = files[0], files[-1]
    before, taken = kept.read_bytes(), json.loads(removed.read_bytes())
    removed.unlink()
    again = benchmark(output)
    assert again.returncode == 0, again.stderr
    assert "1 of 4 runs are to be done" in again.stderr
    assert kept.read_bytes() == before
    assert json.loads(removed.read_bytes())["points"] == taken["points"], (
        "a repeated run gives the same numbers"
    )

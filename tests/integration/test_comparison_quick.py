"""The three-minute form of `simpletuner benchmark tlora`, as it is run on every change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.demo.comparison.plan import QUICK

pytestmark = [
    pytest.mark.timeout(900),  # a busy machine takes long
    pytest.mark.xdist_group("comparison"),  # one worker makes what these tests share, once
]
PROMISED_S = 180
S_PER_PASS = 0.04
"""CPU seconds of the embedded model for one sample, here; a backward counts as two."""
STARTS_S = 20
"""CPU seconds until the command and its two workers have imported everything."""
SHORTER = {"steps": (4, 8), "unequal": (4, 8)}
SCRIPT = f"""
from dataclasses import replace
from simpletuner import cli
from simpletuner.demo.comparison.plan import PLANS
if __name__ == "__main__":  # the workers import this file
    PLANS["quick"] = replace(PLANS["quick"], **{SHORTER})
    cli.main()
"""


def benchmark(output: Path, *, workers: int) -> subprocess.CompletedProcess[str]:
    """The quick form, of fewer steps."""
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "benchmark", "tlora", "--size", "quick"]
    command += ["--workers", str(workers), "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, timeout=840, check=False, env=environment)


def test_quick_form_keeps_its_promise_of_three_minutes() -> None:
    contenders = len(QUICK.contenders) * len(QUICK.ranks) * len(QUICK.concepts) * QUICK.seeds
    images = QUICK.prompts + QUICK.neutral
    trained = QUICK.steps[-1] * QUICK.batch * 3
    measured = len(QUICK.steps) * images * QUICK.sampling_steps * 2  # guidance
    of_the_base = images * QUICK.sampling_steps * 2
    passes = contenders * (trained + measured) + of_the_base
    assert STARTS_S + passes * S_PER_PASS < PROMISED_S, "even with one worker"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("comparison")
    done = benchmark(output, workers=2)
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def test_quick_form_trains_and_measures_every_contender_and_says_how_long_it_takes(
    finished: tuple[Path, str],
) -> None:
    output, said = finished
    names = [contender.name for contender in QUICK.contenders]
    records = [json.loads(file.read_bytes()) for file in (output / "results").glob("*rank*.json")]
    assert sorted(record["run"]["contender"]["name"] for record in records) == sorted(names)
    for record in records:
        assert [point["step"] for point in record["points"]] == [0, *SHORTER["steps"]]
        assert len({json.dumps(point["loss"]) for point in record["points"]}) == 1 + len(SHORTER["steps"])
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
    again = benchmark(output, workers=1)
    assert again.returncode == 0, again.stderr
    assert "1 of 4 runs" in again.stderr
    assert kept.read_bytes() == before
    assert json.loads(removed.read_bytes())["points"] == taken["points"], (
        "a repeated run gives the same numbers"
    )

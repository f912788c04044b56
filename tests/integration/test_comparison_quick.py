"""The three-minute form of `simpletuner benchmark tlora`, as it is run on every change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from simpletuner.demo.comparison.plan import QUICK

pytestmark = pytest.mark.timeout(900)  # a busy machine takes long
PROMISED_S = 180
S_PER_PASS = 0.04
"""CPU seconds of the embedded model for one sample, here; a backward counts as two."""
STARTS_S = 20
"""CPU seconds until the command and its two workers have imported everything."""
SHORTER = {"steps": (2, 4), "unequal": (2, 4), "sampling_steps": 4}
TWO_STARTS = f"""
import multiprocessing.forkserver, shutil, sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from simpletuner import cli
from simpletuner.demo.comparison import measure
from simpletuner.demo.comparison.plan import PLANS

measure.NOISES_PER_VIEW = 1  # in the workers too, which import this file

def start(output):
    sys.argv[1:] = "benchmark tlora --size quick --workers 2 --output".split() + [str(output)]
    with suppress(SystemExit):
        cli.main()

if __name__ == "__main__":
    output = Path(sys.argv[1])
    PLANS["quick"] = replace(PLANS["quick"], **{SHORTER})
    # In place of workers that import torch one by one.
    multiprocessing.set_forkserver_preload(["simpletuner.helpers.training.build"])
    forked = multiprocessing.get_context("forkserver")
    multiprocessing.get_context = lambda _: forked
    start(output)
    shutil.copytree(output, output.with_name("first"))
    sorted((output / "results").glob("*rank*.json"))[-1].unlink()
    print("second start", file=sys.stderr)
    start(output)
    multiprocessing.forkserver._forkserver._stop()  # waits for it, so its CPU time is counted
"""


@dataclass(frozen=True)
class Starts:
    """What two starts left and said; a result was removed between them."""

    first: Path
    second: Path
    said: list[str]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """Two starts of the quick form, with fewer steps."""
    folder = tmp_path_factory.mktemp("comparison")
    script = folder / "starts.py"
    script.write_text(TWO_STARTS)
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "output")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Starts(folder / "first", folder / "output", done.stderr.split("second start"))


def test_quick_form_keeps_its_promise_of_three_minutes() -> None:
    contenders = len(QUICK.contenders) * len(QUICK.ranks) * len(QUICK.concepts) * QUICK.seeds
    images = QUICK.prompts + QUICK.neutral
    trained = QUICK.steps[-1] * QUICK.batch * 3
    measured = len(QUICK.steps) * images * QUICK.sampling_steps * 2  # guidance
    of_the_base = images * QUICK.sampling_steps * 2
    passes = contenders * (trained + measured) + of_the_base
    assert STARTS_S + passes * S_PER_PASS < PROMISED_S, "even with one worker"


def test_quick_form_trains_and_measures_every_contender_and_says_how_long_it_takes(
    starts: Starts,
) -> None:
    output, said = starts.first, starts.said[0]
    names = [contender.name for contender in QUICK.contenders]
    records = [json.loads(file.read_bytes()) for file in (output / "results").glob("*rank*.json")]
    assert sorted(record["run"]["contender"]["name"] for record in records) == sorted(names)
    for record in records:
        assert [point["step"] for point in record["points"]] == [0, *SHORTER["steps"]]
        assert len({json.dumps(point["loss"]) for point in record["points"]}) == 1 + len(SHORTER["steps"])
        assert record["points"][0]["alignment"] > 0.5, "the embedded model follows prompts"
    assert f"1 of {len(names)}" in said
    assert re.search(r"\d+ min", said)


def test_every_contender_ends_elsewhere(starts: Starts) -> None:
    files = (starts.first / "results").glob("*rank*.json")
    last = [json.loads(file.read_bytes())["points"][-1]["loss"] for file in files]
    assert len({json.dumps(each) for each in last}) == len(last)


def test_report_and_plot_name_every_contender_and_nothing_else_is_left(starts: Starts) -> None:
    output = starts.first
    report, plot = (output / "report.md").read_text(), (output / "trade-off.svg").read_text()
    for contender in QUICK.contenders:
        assert f"| {contender.name} |" in report
        assert contender.name in plot
    assert (output / "trade-off.png").stat().st_size > 5000
    assert not list((output / "runs").iterdir())


def test_a_second_start_does_only_what_is_missing(starts: Starts) -> None:
    assert "1 of 4 runs" in starts.said[1]
    first, second = (sorted((each / "results").glob("*rank*.json")) for each in (starts.first, starts.second))
    assert [file.name for file in first] == [file.name for file in second]
    assert [file.read_bytes() for file in first[:-1]] == [file.read_bytes() for file in second[:-1]]
    made, again = (json.loads(files[-1].read_bytes())["points"] for files in (first, second))
    assert made == again, "a repeated run gives the same numbers"

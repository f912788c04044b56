"""Runs of minutes, for `pytest --long`: memory over thousands of steps, and a run that is killed 90 times.

`pytest -m slow --log-cli-level INFO` shows the numbers.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import textwrap
import time
from pathlib import Path

import pytest

from simpletuner.helpers.io.run_folder import ADAPTER_FILE, LOCK_FILE, METRICS_FILE, checkpoint_folders
from tests.integration import memory_of_a_run, processes
from tests.integration.memory_of_a_run import STEPS_BETWEEN
from tests.integration.tiny_runs import COMMAND, TLORA, TinyRun, start, wait_for_steps

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

FEW_LAYERS = TLORA | {"apply_preset": {"target_name": ["down_blocks.*.attn1.to_q"]}}
QUICK_STEPS = {"gradient_checkpointing": False, "resolution": 16, "aspect_bucket_alignment": 8}

STEPS = 10_000
SETTLED = 4_000
"""After this step the memory may no longer grow."""
TRACED_STEPS = 3_000
MAX_GROWTH_MIB = 0.3
"""Per 1,000 steps."""

CRASH_POINT = re.compile(r'crash_point\("([a-z_.]+)"\)')
REPLACES_A_CHECKPOINT = "folder.moved_aside"
AT_ANY_TIME = ""
"""In place of a crash point: killed by another process."""
STEPS_PER_KILL = 6
"""On average a start takes fewer before it is killed, so that the run is not finished too early."""
DIES = """
import os, signal, sys
from simpletuner.helpers.io.faults import at_crash_points
point, passes = sys.argv[2], int(sys.argv[3])

def die(name):
    global passes
    passes -= name == point
    if passes == 0:
        os.kill(os.getpid(), signal.SIGKILL)

with at_crash_points(die):
"""


@pytest.mark.skipif(not memory_of_a_run.STATUS.exists(), reason="Linux alone tells the anonymous memory")
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path: Path) -> None:
    measured = json.loads(memory(tmp_path / "measured", STEPS))
    assert [step for step, _ in measured] == [*range(STEPS_BETWEEN, STEPS + 1, STEPS_BETWEEN)]
    growth_mib = memory_of_a_run.growth(measured, since=SETTLED)
    logger.info("%.3f MiB per 1,000 steps: %s", growth_mib, measured[9::10])
    if growth_mib >= MAX_GROWTH_MIB:
        traced = memory(tmp_path / "traced", TRACED_STEPS, "--trace")
        pytest.fail(f"{growth_mib:.2f} MiB per 1,000 steps\n{measured}\n{traced}")


def memory(folder: Path, steps: int, *options: str) -> str:
    """What memory_of_a_run writes about a run with a log, checkpoints, a report and no tracker."""
    run = TinyRun(folder, lycoris=FEW_LAYERS, keys=QUICK_STEPS)
    run.config(max_train_steps=steps, checkpoint_step_interval=500, checkpoints_total_limit=2)
    file = folder / "memory"
    process = processes.start(Path(memory_of_a_run.__file__), folder / "config.json", file, *options)
    assert process.wait(7000) == 0, process.errors()[-3000:]
    return file.read_text()


@pytest.mark.parametrize("times", [1, 6], ids=["each-crash-point-once", "ninety-kills"])
@pytest.mark.reliability_row(1)
@pytest.mark.reliability_row(2)
def test_run_that_is_killed_at_every_crash_point_and_at_any_time_ends_exactly(
    times: int, tmp_path: Path, repository: Path
) -> None:
    points = crash_points(repository)
    draw = random.Random(times)
    deaths = [*points * times, *[AT_ANY_TIME] * (len(points) * times // 2 - 1)]
    draw.shuffle(deaths)
    deaths = [AT_ANY_TIME, *deaths]  # the first start leaves checkpoints
    keys = {**QUICK_STEPS, "max_train_steps": len(deaths) * STEPS_PER_KILL, "checkpoints_total_limit": 2}
    whole, run = (TinyRun(tmp_path / name, lycoris=FEW_LAYERS, keys=keys) for name in ("whole", "killed"))
    with whole.trainer(checkpoint_step_interval=0) as trainer:
        trainer.run()
        expected = trainer.state_digest()
    for point in deaths:
        die(run, point, draw)
    last = start(run, checkpoint_step_interval=1)
    assert last.wait(600) == 0, last.errors()[-3000:]
    assert f"digest {expected}" in last.output()
    assert run.log() == whole.log()
    assert [each.name for each in run.output_dir.glob(".*")] == [LOCK_FILE]


def crash_points(repository: Path) -> list[str]:
    """Every crash point of the package."""
    texts = (file.read_text() for file in sorted((repository / "simpletuner").rglob("*.py")))
    points = sorted({name for text in texts for name in CRASH_POINT.findall(text)})
    assert {REPLACES_A_CHECKPOINT, "checkpoint.pruning", "file.created"} <= {*points}
    return points


def die(run: TinyRun, point: str, draw: random.Random) -> None:
    """Start the run and have it killed, when it passes a crash point or after a few steps."""
    passes = draw.randint(1, 4)
    if point == REPLACES_A_CHECKPOINT:
        passes = 1
        _, newest = checkpoint_folders(run.output_dir)[-1]
        os.truncate(newest / ADAPTER_FILE, 100)
    run.config(checkpoint_step_interval=1)
    script = run.folder / "dying.py"
    script.write_text(DIES + textwrap.indent(COMMAND, "    "))
    process = processes.start(script, run.folder / "config.json", point, passes)
    if point == AT_ANY_TIME:
        log = run.output_dir / METRICS_FILE
        before = log.read_text().count("\n") if log.exists() else 0
        wait_for_steps(run, before + passes + 2, process=process)
        time.sleep(draw.random() * 0.1)
        process.kill()
    assert process.wait() == -signal.SIGKILL, f"{point} was not passed {passes} times"

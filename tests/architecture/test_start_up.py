"""Help and validation start fast: nothing heavy is imported for them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "lycoris",
    "scipy",
    "matplotlib",
    "wandb",
)
MAX_CPU_S = 0.5
LIBRARIES = "import pydantic, typer, rich.console, rich.logging, rich.progress"
MAX_RATIO = 2.8
"""Of a command's time to that of importing these alone; 1.5 to 2.1 here, 0.17 s."""
COMMANDS = (["--help"], ["train", "--help"], ["validate"], ["examples", "list"], ["version"])

SCRIPT = """
import sys
from simpletuner import cli
sys.argv = ["simpletuner", *sys.argv[1:]]
code = 0
try:
    cli.main()
except SystemExit as end:
    code = end.code or 0
heavy = {name.partition(".")[0] for name in sys.modules} & set(HEAVY)
assert code == 0, f"exit code {code}"
assert not heavy, f"imported {sorted(heavy)}"
"""


def _run(arguments: list[str], *, repository: Path) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.replace("HEAVY", repr(HEAVY))
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_quick_command_imports_no_heavy_library(arguments: list[str], repository: Path) -> None:
    result = _run(arguments, repository=repository)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["validate"]], ids=" ".join)
def test_a_quick_command_takes_under_half_a_second(arguments: list[str], repository: Path) -> None:
    # CPU time, the best of several. Where a busy machine slows everything, the libraries alone are slow too.
    command, libraries = ["-m", "simpletuner", *arguments], ["-c", LIBRARIES]
    rounds = [[_cpu_s(each, repository=repository) for each in (command, libraries)] for _ in range(5)]
    own_s, bare_s = (min(times) for times in zip(*rounds, strict=True))
    assert own_s < max(MAX_CPU_S, MAX_RATIO * bare_s)


def _cpu_s(arguments: list[str], *, repository: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        env=environment,
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

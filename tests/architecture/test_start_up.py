"""Help and validation start fast: nothing heavy is imported for them, and little is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "lycoris",
    "scipy",
    "matplotlib",
    "wandb",
    "trackio",
}
LIBRARIES = "import pydantic, typer.rich_utils, rich.console, rich.logging, rich.progress"
"""What a command imports of libraries to read its arguments and to draw its help."""
MAX_RATIOS = {
    "--help": 1.3,
    **dict.fromkeys(("train --help", "extract --help", "data look --help"), 1.9),
    **dict.fromkeys(("examples list", "version", "--version"), 1.2),
    "validate": 4.2,
    "estimate": 4.3,
}
"""Command -> limit of its Python calls over those of importing the libraries; 1.18, 1.50 to 1.74, 0.64 to
1.08, 3.99 and 4.06 here. Unlike times, both numbers are the same on a busy machine."""
MAX_MODULES = 420
"""Beyond those of the libraries and what these import; 17 to 397 here (validate reads images)."""

# Prints how many Python functions were called and which modules are there at the end.
SCRIPT = """
import json, sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
sys.setprofile(count)
try:
    BODY
    code = 0
except SystemExit as end:
    code = end.code or 0
sys.setprofile(None)
json.dump([code, calls, sorted(sys.modules)], sys.stderr)
"""
RUN = """
    from simpletuner import cli
    cli.main()
"""


@dataclass(frozen=True)
class Start:
    """What a start of Python did."""

    exit_code: int
    num_calls: int
    modules: set[str]


def start(body: str, *arguments: str) -> Start:
    script = SCRIPT.replace("BODY", body.strip())
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    code, num_calls, modules = json.loads(done.stderr.splitlines()[-1])
    return Start(code, num_calls, set(modules))


@pytest.fixture(scope="module")
def libraries() -> Start:
    """The start that every command has: Python and the libraries that print and check."""
    return start(LIBRARIES)


@pytest.mark.parametrize("command", MAX_RATIOS)
def test_a_quick_command_imports_no_heavy_library_and_does_little(command: str, libraries: Start) -> None:
    own = start(RUN, *command.split())
    assert own.exit_code == 0
    assert not {name.partition(".")[0] for name in own.modules} & HEAVY
    assert len(own.modules - libraries.modules) < MAX_MODULES
    assert own.num_calls < MAX_RATIOS[command] * libraries.num_calls


def test_an_upload_imports_no_heavy_library() -> None:
    own = start(
        "\n    import simpletuner.helpers.publishing.publish, simpletuner.helpers.publishing.uploads\n"
    )
    assert not {name.partition(".")[0] for name in own.modules} & HEAVY


def test_a_request_to_a_run_and_the_list_of_runs_import_no_heavy_library() -> None:
    own = start(
        "\n    import simpletuner.helpers.checkpointing.requests, simpletuner.helpers.reporting.run_list\n"
    )
    assert not {name.partition(".")[0] for name in own.modules} & HEAVY


def test_a_look_at_the_data_imports_no_heavy_library() -> None:
    own = start("\n    from simpletuner.helpers.reporting.data_page import look, page\n")
    assert not {name.partition(".")[0] for name in own.modules} & HEAVY

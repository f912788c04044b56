"""The entry of a run: signals from its first lines on, and an end that no library delays."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a program of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, check=False, timeout=60, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
@pytest.mark.reliability_row(3)
def test_signal_while_modules_are_imported_ends_with_code_75_and_the_way_on(
    tmp_path: Path, name: str
) -> None:
    done = run(
        f"""
        import os, signal, sys
        from simpletuner import train

        class Sender:
            def find_spec(self, module, *_):
                if module.startswith("simpletuner.helpers.configuration"):
                    os.kill(os.getpid(), signal.{name})

        sys.meta_path.insert(0, Sender())
        sys.exit(train.main(["--config", "absent.json"]))
        """,
        tmp_path,
    )
    assert done.returncode == 75, done.stderr
    assert "same command goes on" in done.stderr.splitlines()[-1]


@pytest.mark.reliability_row(24)
def test_exit_handler_that_waits_for_ever_is_cut_off_with_the_code_of_the_run(tmp_path: Path) -> None:
    started_s = time.monotonic()
    done = run(
        """
        import atexit, sys, time
        from simpletuner import train

        atexit.register(time.sleep, 50)
        train.EXIT_WAIT_S = 0.1
        sys.exit(train.main(["--config", "absent.json"]))
        """,
        tmp_path,
    )
    assert done.returncode == 2
    assert "absent.json" in done.stderr
    assert time.monotonic() - started_s < 40

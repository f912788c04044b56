"""One run per output folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.lock import is_held, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from simpletuner.helpers.io.lock import run_lock

with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def started_holder(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.reliability_row(27)
def test_a_second_run_is_refused_and_a_dead_lock_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    with started_holder(folder) as holder:
        try:
            named = f"process {holder.pid} on {socket.gethostname()}"
            with pytest.raises(StorageError, match=named), run_lock(folder):
                pass
        finally:
            holder.kill()
    with run_lock(folder):
        assert str(os.getpid()) in (folder / ".run.holder.json").read_text(encoding="utf-8")


def test_folder_is_held_while_its_holder_lives(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with started_holder(tmp_path) as holder:
        try:
            assert is_held(tmp_path)
        finally:
            holder.kill()
    assert (tmp_path / ".run.holder.json").exists(), "a killed holder leaves it"
    assert not is_held(tmp_path)


def test_run_lock_can_be_taken_again_after_release(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path):
            pass
    assert not (tmp_path / ".run.holder.json").exists()


@pytest.mark.reliability_row(26)
def test_run_lock_on_a_path_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/output"), run_lock(tmp_path / "file" / "output"):
        pass

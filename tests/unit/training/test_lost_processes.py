"""A broken connection names the ranks that ended; other errors stay as they are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.training import lost_processes
from simpletuner.helpers.training.lost_processes import Process, naming_lost_processes

pytestmark = pytest.mark.reliability_row(31)

HERE = socket.gethostname()
BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


@pytest.fixture
def ended() -> Iterator[int]:
    """The id of a process that ended, which its parent has not asked for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    yield process.pid
    process.wait()


def message(monkeypatch: pytest.MonkeyPatch, processes: list[Process], error: Exception = BROKEN) -> str:
    monkeypatch.setattr(lost_processes, "gather_object", lambda _: processes)
    monkeypatch.setattr(lost_processes, "_ENDS_WITHIN_S", 2.0 if len(processes) > 2 else 0.0)
    accelerator = SimpleNamespace(num_processes=len(processes), process_index=0)
    with pytest.raises(TrainingError) as info, naming_lost_processes(accelerator):
        raise error
    return str(info.value)


def test_rank_that_ended_on_this_host_is_named(monkeypatch: pytest.MonkeyPatch, ended: int) -> None:
    text = message(monkeypatch, [(HERE, os.getpid()), (HERE, os.getppid()), (HERE, ended)])
    assert f"rank 2 (process {ended} on {HERE}" in text
    assert "rank 1" not in text


def test_ranks_of_other_hosts_are_named_when_all_run_here(
    monkeypatch: pytest.MonkeyPatch, ended: int
) -> None:
    """A process of another host may have the number of one that ended here."""
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    assert "ranks 1 on other hosts" in message(monkeypatch, [(HERE, os.getpid()), ("elsewhere", ended)])


def test_another_error_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_processes, "gather_object", lambda _: [(HERE, os.getpid())] * 2)
    accelerator = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(RuntimeError, match="out of memory"), naming_lost_processes(accelerator):
        raise RuntimeError("out of memory")

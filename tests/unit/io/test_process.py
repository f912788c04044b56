"""Whether a process runs, and how much memory this one took."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simpletuner.helpers.io.process import is_running, peak_memory_mib


def test_this_process_runs_and_one_that_ended_does_not() -> None:
    assert is_running(os.getpid())
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()  # its end closes the pipe
    while os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert not is_running(ended.pid), "nobody has asked for its exit code yet"
    ended.wait()
    assert not is_running(ended.pid)


def test_a_number_that_no_process_has_is_of_none() -> None:
    assert not is_running(1 << 40)
    with pytest.raises(ValueError, match="-1"):
        is_running(-1)


def test_asking_sends_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: sent.append(number))
    assert is_running(os.getpid())
    assert sent == []


@pytest.mark.parametrize("has_resource", [True, False])
def test_peak_memory_holds_what_was_allocated(has_resource: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_resource:
        monkeypatch.setitem(sys.modules, "resource", None)
    assert 10 < peak_memory_mib() < 1 << 20
    block = bytearray(os.urandom(1) * (256 << 20))
    assert peak_memory_mib() >= len(block) >> 20

"""Signals ask for an orderly end, and a second one ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED, Preempted, Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_preemption_notes_the_first_signal_and_restores_the_handler(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        preemption.check("waiting")
        os.kill(os.getpid(), number)
        assert preemption.requested
        with pytest.raises(Preempted, match="waiting"):
            preemption.check("waiting")
    assert signal.getsignal(number) == before


def test_hangup_that_nohup_ignores_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_preempted_carries_the_exit_code_of_a_run_that_can_be_resumed() -> None:
    assert Preempted.exit_code == EXIT_PREEMPTED == 75


@pytest.mark.parametrize(
    ("later_s", "second", "code"),
    [(0.4, "SIGTERM", 0), (0.6, "SIGTERM", 128 + signal.SIGTERM), (0.6, "SIGHUP", 0)],
)
def test_second_signal_ends_the_process_unless_it_is_the_first_one_passed_on_or_a_closing_terminal(
    later_s: float, second: str, code: int
) -> None:
    script = f"""
        import os, signal, time
        from simpletuner.helpers.checkpointing.preemption import Preemption
        time.monotonic = iter([100.0, 100.0 + {later_s}]).__next__
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.{second})
            assert preemption.requested
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == code
    assert ("The same command goes on" in done.stderr) == (code != 0)

"""Signals ask for an orderly end, and a second one ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED, Preempted, Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_preemption_notes_the_first_signal_and_restores_the_handler(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        preemption.check("waiting")
        os.kill(os.getpid(), number)
        assert preemption.requested
        with pytest.raises(Preempted, match="waiting"):
            preemption.check("waiting")
    assert signal.getsignal(number) == before


def test_preempted_carries_the_exit_code_of_a_run_that_can_be_resumed() -> None:
    assert Preempted.exit_code == EXIT_PREEMPTED == 75


@pytest.mark.parametrize(("later_s", "code"), [(0.4, 0), (0.6, 128 + signal.SIGTERM)])
def test_second_signal_ends_the_process_unless_it_is_the_first_one_passed_on(
    later_s: float, code: int
) -> None:
    script = f"""
        import os, signal, time
        from simpletuner.helpers.checkpointing.preemption import Preemption
        time.monotonic = iter([100.0, 100.0 + {later_s}]).__next__
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=60)
    assert done.returncode == code

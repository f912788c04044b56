"""This process and others of this machine, on every operating system."""

from __future__ import annotations

import sys


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not.

    Raises:
        ValueError: No process has such a number.
    """
    import psutil  # only when it is needed: `validate` is quick

    # No signal 0 as a question: Windows would send it as Ctrl-C.
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # it belongs to another user
        return True


def peak_memory_mib() -> float:
    """Peak main memory of this process, MiB."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()._asdict()
        return float(memory.get("peak_wset", memory["rss"])) / 2**20
    peak = getrusage(RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere

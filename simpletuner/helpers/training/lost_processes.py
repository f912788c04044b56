"""Names the processes of a run that ended while this one waited for them.

A launcher ends the others itself. Without one, this process meets a broken connection.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.io.names import one_line_reason
from simpletuner.helpers.io.process import is_running

if TYPE_CHECKING:
    from accelerate import Accelerator

# Texts of the RuntimeErrors that torch raises for a broken connection.
_CONNECTION = re.compile(r"gloo|nccl|connection|peer|socket", re.IGNORECASE)
# A process closes its connections before the system counts it as ended.
_ENDS_WITHIN_S = 5.0

Process = tuple[str, int]
"""Host and process id."""


@contextmanager
def naming_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """Turn a broken connection to other processes of the run into an error that names their ranks.

    Every process calls it.

    Raises:
        TrainingError: Inside the context, the connection to another process broke.
    """
    if accelerator.num_processes == 1:
        yield
        return
    processes: list[Process] = gather_object([(socket.gethostname(), os.getpid())])
    try:
        yield
    except RuntimeError as error:
        if not _CONNECTION.search(str(error)):
            raise
        lost = _described(_lost(processes), processes)
        raise TrainingError(
            f"Rank {accelerator.process_index} lost the connection to {lost}. "
            "Its own message says why it ended, if it was not killed. The same command goes on from the last "
            f"checkpoint. ({one_line_reason(error)})"
        ) from error


def _described(lost: Sequence[int], processes: Sequence[Process]) -> str:
    """The ranks that ended, or those on other hosts, of which one must have."""
    if lost:
        return ", ".join(
            f"rank {rank} (process {processes[rank][1]} on {processes[rank][0]}, which ended)"
            for rank in lost
        )
    away = [str(rank) for rank, (host, _) in enumerate(processes) if host != socket.gethostname()]
    return f"one of ranks {', '.join(away)} on other hosts" if away else "another rank, which still runs"


def _lost(processes: Sequence[Process]) -> list[int]:
    """Ranks of the ended processes on this host; waits a moment for the first."""
    here = {rank: pid for rank, (host, pid) in enumerate(processes) if host == socket.gethostname()}
    deadline_s = time.monotonic() + _ENDS_WITHIN_S
    while not (lost := [rank for rank, pid in here.items() if not is_running(pid)]):
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    return lost

"""Python processes that begin with the trainer imported, each forked from one that imported it and waits.

A process started anew spends seconds importing torch; apart from that these are processes like any other,
with their own signals, memory, environment and exit code. Tests that start one are in the group "processes",
so that one test process imports the trainer for all.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
IMPORTED = [
    "tests.integration.processes",
    "simpletuner.helpers.training.build",
    "simpletuner.helpers.models.sdxl.family",
    "simpletuner.helpers.models.flux.family",
    "torch.distributed.tensor",
]


@dataclass(frozen=True)
class Running:
    """A process, and the files that take what it prints."""

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """End it as the system would, without a chance to tidy up."""
        self.process.kill()

    def terminate(self) -> None:
        """Ask it to stop, by SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, timeout_s: float = 280) -> int:
        """Its exit code once it has ended; that of a signal is negative."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s: {self.errors()}")
        return self.process.exitcode

    def output(self) -> str:
        return self.out.read_text()

    def errors(self) -> str:
        return self.err.read_text()


def start(
    script: Path,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
) -> Running:
    """Run a script as `python script arguments` would."""
    _start_server()
    folder = Path(tempfile.mkdtemp(prefix="process_"))
    out, err = folder / "out", folder / "err"
    own = {**os.environ, "ACCELERATE_USE_CPU": "true", **(environment or {})}
    process = multiprocessing.get_context("forkserver").Process(
        target=_run,
        args=(str(script), [*map(str, arguments)], own, str(cwd), [str(out), str(err)]),
        daemon=True,
    )
    process.start()
    return Running(process, out, err)


def start_ranks(script: Path, *arguments: object) -> list[Running]:
    """Two processes of one run, with the variables that a launcher sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(script, *arguments, environment={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


def wait_for_all(processes: Sequence[Running]) -> None:
    """Return once all have ended well."""
    codes = [process.wait() for process in processes]
    assert not any(codes), (codes, *(process.errors()[-3000:] for process in processes))


def stop_server() -> None:
    """End the process that the others are forked from and wait for it: so its CPU time is counted."""
    forkserver._forkserver._stop()


def _start_server() -> None:
    """Start the process that the others are forked from; where it runs already nothing happens."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), path]))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def _run(script: str, arguments: list[str], environment: dict[str, str], cwd: str, files: list[str]) -> None:
    gc.freeze()  # what the server imported
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(each, "wb", 0), write_through=True) for each in (1, 2)
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

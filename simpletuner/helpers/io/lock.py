"""One run per output folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.faults import StorageError, storage_error
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.process import is_running
from simpletuner.helpers.io.run_folder import LOCK_FILE, LOCK_HOLDER_FILE

RUN_REMEDY = "Wait for that run to end, stop it, or set another output_dir."


@contextmanager
def run_lock(folder: Path, *, remedy: str = RUN_REMEDY) -> Iterator[None]:
    """Lock a folder, an output folder for one run, and create it if it is missing; `remedy` ends the error.

    The operating system releases the lock when the process dies, so the next run can take it.

    Raises:
        StorageError: Another run holds the lock (the message names its process and host), or the folder
            cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(f"{printable(str(folder))}: in use by {_holder(folder)}. {remedy}") from error
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        write_json(folder / LOCK_HOLDER_FILE, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        (folder / LOCK_HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a run seems to hold a folder. It takes no lock, which could keep a run out."""
    try:
        holder = json.loads((folder / LOCK_HOLDER_FILE).read_bytes())
        return holder["host"] != socket.gethostname() or is_running(int(holder["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK_HOLDER_FILE).read_bytes())
        return f"process {int(holder['pid'])} on {printable(str(holder['host']))}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"

"""Logging to standard error, without the information lines of libraries."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from functools import cache

from rich.console import Console
from rich.text import Text

from simpletuner.helpers.io.redaction import redact_terminal

HANDLER_NAME = "simpletuner"
_STYLES = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}

# Libraries that log more information lines than we do.
_CHATTY = (
    "LyCORIS",
    "PIL",
    "accelerate",
    "aiobotocore",
    "asyncssh",
    "azure",
    "bitsandbytes",
    "botocore",
    "diffusers",
    "filelock",
    "fsspec",
    "gcsfs",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "lycoris",
    "matplotlib",
    "peft",
    "s3fs",
    "root",  # what libraries log without a logger of their own
    "torch",
    "torchao",
    "transformers",
    "urllib3",
    "wandb",
)


@cache
def terminal() -> Console:
    """The console of log lines and progress bars; one for both, so that lines are printed above a bar."""
    return Console(stderr=True)


class TerminalHandler(logging.Handler):
    """Prints records on a console without breaking their lines: the terminal wraps them, paths stay whole."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, coloured by its level."""
        try:
            style = _STYLES.get(record.levelname, "")
            self.console.print(Text(self.format(record), style=style), soft_wrap=True)
        except (OSError, ValueError):  # the terminal is gone
            self.handleError(record)


def configure_logging(
    level: str = "INFO", *, main_process: bool = True, console: Console | None = None
) -> None:
    """Log to standard error, redacted, one line per event; only the main process logs below level error.

    Call it before diffusers, transformers and the hub's client are imported: they read these environment
    variables on import.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The hub's client would send it the processor, the libraries and the speed of each transfer.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # torch has a handler of its own, and torchao's import makes it warn.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    redact_terminal()
    handler: logging.Handler
    if console is None and not sys.stderr.isatty():
        handler = logging.StreamHandler()
    else:
        handler = TerminalHandler(console or terminal())
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)-8s %(message)s", "%X"))
    handler.set_name(HANDLER_NAME)
    handler.addFilter(_is_ours_or_error)
    root = logging.getLogger()
    for previous in [each for each in root.handlers if each.name == HANDLER_NAME]:
        root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(level.upper() if main_process else logging.ERROR)


def leave_closed_terminal() -> None:
    """Write standard output and error nowhere if their terminal was closed: every write there fails."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError as error:
            if error.errno != errno.EIO:
                continue
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _is_ours_or_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in _CHATTY


_logged: set[str] = set()


def log_once(log: Callable[[str], None], message: str) -> None:
    """Log a message once per process; `log` is for instance `logger.warning`."""
    if message not in _logged:
        _logged.add(message)
        log(message)


def reset_log_once() -> None:
    """Forget which messages `log_once` has logged."""
    _logged.clear()

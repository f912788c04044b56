"""Where log lines go and which libraries may write them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

HANDLER_NAME = "simpletuner"

# The logger names of libraries whose information lines would bury ours.
_CHATTY = (
    "LyCORIS",
    "PIL",
    "accelerate",
    "diffusers",
    "filelock",
    "fsspec",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "lycoris",
    "matplotlib",
    "peft",
    "torch",
    "transformers",
    "urllib3",
    "wandb",
)


def configure_logging(
    level: str = "INFO", *, main_process: bool = True, console: Console | None = None
) -> None:
    """Send our log lines to standard error, one line an event; other processes than the main one stay silent.

    Must run before diffusers and transformers are imported: they set up their own logging on import, by the
    environment variables that are given here a quieter default.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler: logging.Handler
    if console is None and not sys.stderr.isatty():  # a path cut in two is of no use in a file
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)-8s %(message)s", "%X"))
    else:
        console = console or Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    handler.set_name(HANDLER_NAME)
    handler.addFilter(_from_us_or_serious)
    root = logging.getLogger()
    for previous in [each for each in root.handlers if each.name == HANDLER_NAME]:
        root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(level.upper() if main_process else logging.ERROR)


def _from_us_or_serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in _CHATTY


_said: set[str] = set()


def log_once(log: Callable[[str], None], message: str) -> None:
    """Log a message the first time it is given in this process; `log` is for instance `logger.warning`."""
    if message not in _said:
        _said.add(message)
        log(message)


def reset_log_once() -> None:
    """Let every message be logged once more."""
    _said.clear()

"""What every test runs under: one thread, no network, no tracker that calls home."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.helpers.io import redaction
from simpletuner.helpers.io.logs import HANDLER_NAME

# Before torch is imported by any test: two threads wait for each other in a spin on a busy machine, and the
# number of threads changes the last digits of results.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"

# A shell that starts the tests in the background has them ignore SIGINT, nohup SIGHUP, and every program that
# they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LOG_LEVEL = logging.getLogger().level
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --long."""
    parser.addoption("--long", action="store_true", help="run the tests that are marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """Select the slow tests under --long."""
    if config.getoption("--long"):
        config.option.markexpr = config.option.markexpr.replace(" and not slow", "")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking the imported libraries again and again: a sixth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the values of environment variables that the configurations of other tests named."""
    monkeypatch.setattr(redaction, "_hidden", {})
    monkeypatch.setattr(redaction, "_placeholders", {})


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what a command, in the test or in a fixture of its file, did to the root logger."""
    root = logging.getLogger()
    root.setLevel(LOG_LEVEL)
    yield
    for handler in [each for each in root.handlers if each.name == HANDLER_NAME]:
        root.removeHandler(handler)


@pytest.fixture(autouse=True, scope="module")
def _accelerate_as_it_was() -> Iterator[None]:
    """Forget the precision and the accumulation that a file's tests left with accelerate for the process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        for kept in (state.AcceleratorState, state.PartialState, state.GradientState):
            kept._reset_state()

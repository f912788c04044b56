"""Which log lines are shown."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from simpletuner.helpers.io.logs import TerminalHandler, configure_logging


@pytest.fixture
def shown() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield io.StringIO()
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


def test_configure_logging_shows_our_lines_and_only_errors_of_libraries(shown: io.StringIO) -> None:
    configure_logging(console=Console(file=shown, width=200))
    logging.getLogger("simpletuner.helpers.data").info("Encoded %d images.", 3)
    logging.getLogger("diffusers.pipelines").warning("chatter")
    logging.getLogger("urllib3").error("serious")
    assert "Encoded 3 images." in shown.getvalue()
    assert "chatter" not in shown.getvalue()
    assert "serious" in shown.getvalue()


@pytest.mark.parametrize("name", ["torchao", "torchao.ops", "bitsandbytes.cextension", "root"])
def test_configure_logging_hides_what_libraries_warn_of_on_import(shown: io.StringIO, name: str) -> None:
    configure_logging(console=Console(file=shown, width=200))
    logging.getLogger(name).warning("Failed to load")
    assert shown.getvalue() == ""


def test_configure_logging_hides_the_warnings_of_torchs_own_handler() -> None:
    configure_logging()
    assert not logging.getLogger("torch.utils._pytree").isEnabledFor(logging.WARNING)


def test_configure_logging_keeps_other_processes_silent(shown: io.StringIO) -> None:
    configure_logging(main_process=False, console=Console(file=shown, width=200))
    logging.getLogger("simpletuner.helpers.data").warning("skipped")
    assert shown.getvalue() == ""


def test_configure_logging_twice_shows_each_line_once(shown: io.StringIO) -> None:
    for _ in range(2):
        configure_logging(console=Console(file=shown, width=200))
    logging.getLogger("simpletuner").info("once")
    assert shown.getvalue().count("once") == 1
    assert sum(isinstance(handler, TerminalHandler) for handler in logging.getLogger().handlers) == 1


def test_a_terminal_of_80_columns_gets_whole_paths(shown: io.StringIO) -> None:
    configure_logging(console=Console(file=shown, width=80, force_terminal=True, color_system=None))
    path = "/srv/" + "folder/" * 20 + "pytorch_lora_weights.safetensors"
    logging.getLogger("simpletuner").warning("Adapter: [%s] in %s", "bold", path)
    (line,) = shown.getvalue().splitlines()
    assert line.endswith(f"Adapter: [bold] in {path}")


def test_configure_logging_writes_whole_unpadded_lines_where_there_is_no_terminal(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", shown)
    configure_logging()
    logging.getLogger("simpletuner").info("Saved %s", "a/" * 100)
    (line,) = shown.getvalue().splitlines()
    assert line.endswith("Saved " + "a/" * 100)

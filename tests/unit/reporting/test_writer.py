"""The report around a run: written when it starts and when it fails, and never the cause of a failure."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.io.run_folder import PAGE_FILE, RUN_MANIFEST_FILE
from simpletuner.helpers.reporting.html_report import writer
from simpletuner.helpers.reporting.html_report.writer import RunPage


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The states in which the report is written."""
    written: list[str] = []

    def write_page(output_dir: Path, *, state: str, step: int | None) -> Path:
        written.append(state)
        return output_dir / PAGE_FILE

    monkeypatch.setattr(writer, "write_page", write_page)
    return written


def test_report_is_written_when_the_run_starts_with_its_information(
    tmp_path: Path, states: list[str]
) -> None:
    with RunPage(tmp_path, is_enabled=True, manifest=lambda: {"max_steps": 4}):
        assert json.loads((tmp_path / RUN_MANIFEST_FILE).read_text()) == {"max_steps": 4}
        assert states == ["running"]
    assert states == ["running"]


@pytest.mark.parametrize(("error", "state"), [(TrainingError, ["running", "failed"]), (OSError, ["running"])])
def test_report_says_that_the_run_failed_if_the_error_is_ours(
    tmp_path: Path, states: list[str], error: type[Exception], state: list[str]
) -> None:
    with pytest.raises(error), RunPage(tmp_path, is_enabled=True):
        raise error
    assert states == state


def test_information_that_cannot_be_collected_costs_a_warning(
    tmp_path: Path, states: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, Any]:
        raise KeyError("no such package")

    with caplog.at_level(logging.WARNING), RunPage(tmp_path, is_enabled=True, manifest=fail):
        pass
    assert "KeyError" in caplog.text
    assert not states


def test_other_processes_write_neither_report_nor_information(tmp_path: Path, states: list[str]) -> None:
    with RunPage(tmp_path, is_enabled=False, manifest=lambda: {"max_steps": 4}):
        pass
    assert not states
    assert not list(tmp_path.iterdir())

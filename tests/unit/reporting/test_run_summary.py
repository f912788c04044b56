"""The summary that marks a run as finished, and the log of a finished run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.io.run_folder import SUMMARY_FILE
from simpletuner.helpers.publishing.uploads import Uploads
from simpletuner.helpers.reporting.run_summary import FinishedRun, RunSummary, load_summary

NO_UPLOADS = Uploads(output_dir=Path("output"), is_enabled=False)
SUMMARY = RunSummary(
    step=6,
    adapter="a.safetensors",
    checkpoint="c",
    metrics="m.jsonl",
    config="c.json",
    grid="g.png",
    page="report.html",
)


def test_summary_survives_a_round_trip(tmp_path: Path) -> None:
    SUMMARY.save(tmp_path)
    assert load_summary(tmp_path) == SUMMARY


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "Adapter:     a.safetensors"),
        ({"adapter": "out/learned_embeds.safetensors"}, "New token:   out/learned_embeds.safetensors"),
        ({"adapter": "out/unet", "model": "unet"}, "Model:       out/unet"),
    ],
    ids=["adapter", "token", "model"],
)
def test_what_was_trained_is_named_by_its_kind(
    keys: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        replace(SUMMARY, plain="plain.safetensors", **keys).show()
    assert line in caplog.messages
    assert f"(the {line.partition(':')[0].lower()} is the EMA)" in caplog.text


def test_summary_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    SUMMARY.save(tmp_path)
    file = tmp_path / SUMMARY_FILE
    old = {
        key: value for key, value in json.loads(file.read_bytes()).items() if key not in ("page", "comfyui")
    }
    file.write_text(json.dumps(old))
    assert load_summary(tmp_path) == replace(SUMMARY, page=None)


@pytest.mark.parametrize("step", [None, "2", 2.5])
def test_a_summary_whose_step_is_no_number_of_steps_marks_nothing_as_finished(
    step: object, tmp_path: Path
) -> None:
    SUMMARY.save(tmp_path)
    file = tmp_path / SUMMARY_FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"step": step}))
    assert load_summary(tmp_path) is None


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"step": 1}', b"\xff"])
def test_summary_that_cannot_be_read_marks_nothing_as_finished(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / SUMMARY_FILE).write_bytes(content)
    assert load_summary(tmp_path) is None


def test_a_finished_run_longer_than_it_is_asked_for_names_both_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        FinishedRun(replace(SUMMARY, step=60), 1, NO_UPLOADS).run()
    assert "6 of 1" not in caplog.text
    assert "60 steps, more than the 1" in caplog.text
    assert "max_train_steps above 60" in caplog.text


def test_finished_run_ends_well_and_says_where_everything_lies(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert FinishedRun(SUMMARY, 6, NO_UPLOADS).run() == 0
    assert "step 6 of 6" in caplog.text
    assert "max_train_steps" in caplog.text
    for place in (
        SUMMARY.adapter,
        SUMMARY.checkpoint,
        SUMMARY.metrics,
        SUMMARY.config,
        SUMMARY.grid,
        SUMMARY.page,
    ):
        assert str(place) in caplog.text


def test_paths_of_a_summary_show_no_value_of_an_environment_variable(tmp_path: Path) -> None:
    hide("my secret", "{env:KEY}")
    replace(SUMMARY, adapter="my secret/a.safetensors").save(tmp_path)
    found = load_summary(tmp_path)
    assert found is not None
    assert found.adapter == "{env:KEY}/a.safetensors"

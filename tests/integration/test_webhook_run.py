"""The messages of a run, and what a webhook leaves of its address on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.tiny_runs import TinyRun
from tests.receiver import TOKEN, receiving

pytestmark = pytest.mark.usefixtures("shared_caches")


def test_a_run_tells_of_its_start_its_checkpoints_and_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    run = TinyRun(tmp_path)
    with receiving() as receiver:
        hook = {"webhook_type": "raw", "webhook_url": receiver.url}
        assert run.run(max_train_steps=4, webhook_config=hook, tracker_run_name="cats") == 0
        sent = [(each["message_type"], each["step"], each["prefix"]) for each in receiver.objects()]
        assert sent == [
            ("start", 0, "cats"),
            ("checkpoint", 2, "cats"),
            ("checkpoint", 4, "cats"),  # due, and the last: saved once
            ("end", 4, "cats"),
        ]
    written = [file for file in run.output_dir.rglob("*") if file.is_file()]
    assert len(written) > 5
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in caplog.text


def test_a_failure_is_told_and_ends_the_run_as_without_a_webhook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(Trainer, "apply_gradients", fail)
    with receiving() as receiver:
        hook = {"webhook_type": "raw", "webhook_url": receiver.url, "log_level": "error"}
        with pytest.raises(TrainingError, match="not finite"):
            TinyRun(tmp_path).run(webhook_config=hook)
        (sent,) = receiver.objects()
    assert (sent["message_type"], sent["severity"]) == ("error", "error")
    assert "TrainingError: the loss is not finite" in sent["message"]


def test_an_address_that_nobody_answers_ends_no_run(tmp_path: Path) -> None:
    hook = {"webhook_type": "discord", "webhook_url": "http://127.0.0.1:9/x"}
    assert TinyRun(tmp_path).run(max_train_steps=1, webhook_config=hook) == 0

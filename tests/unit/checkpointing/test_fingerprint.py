"""Which settings a resumed run must share with the one that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.checkpointing.fingerprint import resume_fingerprint
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry


@pytest.mark.parametrize(
    ("override", "is_another_run"),
    [
        ("lora_format=comfyui", False),
        ("learning_rate=0.5", False),
        ("lora_dropout=0.5", False),
        ("lora_rank=3", True),
        ("optimizer=prodigy", True),
    ],
)
def test_what_is_written_or_how_fast_may_change_and_what_is_trained_may_not(
    override: str, is_another_run: bool, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)

    def settings(*overrides: str) -> object:
        given = ("lora_type=standard", *overrides)
        return resume_fingerprint(
            load_config(Path("config/config.json"), overrides=given, families=registry.specs())
        )

    assert (settings(override) != settings()) == is_another_run

"""Which settings a resumed run must share with the one that was saved."""

from __future__ import annotations

import json
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


def test_value_of_an_environment_variable_is_a_digest_in_texts_and_leaves_choices(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    lycoris = {"algo": "tlora", "multiplier": 1, "linear_dim": 8, "linear_alpha": 8}
    preset = {"target_name": ["{env:TOY_LAYER}"], "target_module": []}
    overrides = [
        f"lycoris_config={json.dumps({**lycoris, 'apply_preset': preset})}",
        "tracker_run_name={env:TOY_RUN}",
    ]
    found = []
    for layer, run in (("to_k.*", "tlora"), ("to_q.*", "another")):
        monkeypatch.setenv("TOY_LAYER", layer)
        monkeypatch.setenv("TOY_RUN", run)
        config = load_config(Path("config/config.json"), overrides=overrides, families=registry.specs())
        found.append(resume_fingerprint(config))
    first, other = found
    assert {key for key in first if first[key] != other[key]} == {"lycoris apply_preset"}
    assert "to_" not in json.dumps(first["lycoris apply_preset"])
    assert first["lycoris algo"] == "tlora"

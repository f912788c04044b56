"""Settings and data that changed since the checkpoint are logged, and kept by step for the report."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from simpletuner.helpers.checkpointing.changes import (
    DATA_PART,
    changes_since,
    hidden_facts,
    load_changes,
    record_changes,
)
from simpletuner.helpers.checkpointing.checkpoints import Checkpoint
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.io.run_folder import CHANGES_FILE, COMPATIBILITY_FILE, CONFIG_FILE
from simpletuner.helpers.models import registry

CONFIG = {
    "seed": 1,
    "learning_rate": 0.1,
    "output_dir": "a",
    "validation_seed": 1,
    "cache_dir_vae": "a",
    "data_backend_config": [{"id": "cats", "crop": True, "cache_dir_vae": "a"}],
}
DATA = {"number of images": 3}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return made(tmp_path, 4)


def made(folder: Path, step: int, *, config: object = CONFIG) -> Checkpoint:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / CONFIG_FILE).write_text(json.dumps(config))
    (path / COMPATIBILITY_FILE).write_text(json.dumps({"settings": {}, DATA_PART: DATA}))
    return Checkpoint(path, step)


def test_each_key_that_has_an_effect_on_training_is_a_line(checkpoint: Checkpoint) -> None:
    datasets = [{"id": "cats", "crop": False, "cache_dir_vae": "b"}]
    other = dict.fromkeys(("output_dir", "validation_seed", "cache_dir_vae"), "b")
    resolved = {**CONFIG, **other, "seed": 2, "learning_rate": 0.2, "data_backend_config": datasets}
    assert changes_since(checkpoint, resolved=resolved, data={"number of images": 4}) == [
        "dataset cats, crop: true before, false now",
        "learning_rate: 0.1 before, 0.2 now",
        "number of images: 3 before, 4 now",
        "seed: 1 before, 2 now",
    ]


def test_what_evaluations_measure_is_a_line_and_when_they_are_made_is_none(tmp_path: Path) -> None:
    keys = ("num_eval_images", "eval_timesteps", "eval_steps_interval", "eval_loss_disable")
    checkpoint = made(tmp_path, 4, config=dict.fromkeys(keys, 1))
    assert changes_since(checkpoint, resolved=dict.fromkeys(keys, 2), data={}) == [
        "eval_timesteps: 1 before, 2 now",
        "num_eval_images: 1 before, 2 now",
    ]


def test_nothing_is_said_of_equal_settings_or_of_keys_that_one_version_does_not_know(
    checkpoint: Checkpoint,
) -> None:
    assert changes_since(checkpoint, resolved=CONFIG, data=DATA) == []
    assert changes_since(checkpoint, resolved={**CONFIG, "new_key": 1}, data={**DATA, "new": 1}) == []
    (checkpoint.path / COMPATIBILITY_FILE).write_text('{"settings": {}}')
    assert changes_since(checkpoint, resolved=CONFIG, data={"number of images": 4}) == []


def test_tuples_of_the_configuration_equal_the_lists_of_a_file(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, 4, config={"betas": [0.9, 0.99]})
    assert changes_since(checkpoint, resolved={"betas": (0.9, 0.99)}, data={}) == []


def record(folder: Path, resumed: Checkpoint | None, **keys: object) -> list[tuple[int, list[str]]]:
    record_changes(folder, resumed, resolved={**CONFIG, **keys}, data=DATA)
    return [(each["step"], each["changes"]) for each in load_changes(folder)]


def test_changes_are_logged_and_kept_by_step_and_those_of_steps_that_are_trained_again_are_not(
    tmp_path: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    second, third = ["seed: 1 before, 2 now"], ["seed: 1 before, 3 now"]
    with caplog.at_level(logging.WARNING):
        assert record(tmp_path, checkpoint, seed=2) == [(4, second)]
    assert second[0] in caplog.text
    assert record(tmp_path, checkpoint, seed=2) == [(4, second)], "started again from the same checkpoint"
    later = made(tmp_path, 9)
    assert record(tmp_path, later, seed=3) == [(4, second), (9, third)]
    assert record(tmp_path, later) == [(4, second)]
    assert record(tmp_path, checkpoint) == []
    assert record(tmp_path, None) == []


def test_a_run_without_changes_has_no_file(tmp_path: Path, checkpoint: Checkpoint) -> None:
    assert record(tmp_path, checkpoint) == record(tmp_path, None) == []
    assert not (tmp_path / CHANGES_FILE).exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"step": "x", "changes": []}]', '[{"step": 1}]'])
def test_a_damaged_file_of_changes_is_an_empty_one(tmp_path: Path, content: str) -> None:
    (tmp_path / CHANGES_FILE).write_text(content)
    assert load_changes(tmp_path) == []


def test_a_long_value_is_cut(checkpoint: Checkpoint) -> None:
    (line,) = changes_since(checkpoint, resolved={**CONFIG, "seed": "x" * 1000}, data=DATA)
    assert len(line) < 300


def test_another_value_of_an_environment_variable_is_a_change_that_does_not_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.chdir(repository)
    (tmp_path / "a.png").write_bytes(b"not decoded here")
    dataset = {"id": "a", "instance_data_dir": str(tmp_path), "instance_prompt": "{env:TOY_SUBJECT}"}
    overrides = [f"data_backend_config={json.dumps([dataset])}", "tracker_run_name={env:TOY_SUBJECT}"]
    facts = []
    for value in ("first value", "other value"):
        monkeypatch.setenv("TOY_SUBJECT", value)
        config = load_config(Path("config/config.json"), overrides=overrides, families=registry.specs())
        facts.append(hidden_facts(config))
    first, other = facts
    assert list(first) == list(other) == ["dataset a, instance_prompt, digest"]
    assert first != other
    assert "value" not in json.dumps(facts)

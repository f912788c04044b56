"""Environment variables in values: filled in, shown nowhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.io.redaction import redacted

if TYPE_CHECKING:
    from conftest import Workspace

SECRET = "hf_veryverysecret"


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_SECRET", SECRET)
    monkeypatch.setenv("TOY_STEPS", "12")
    monkeypatch.setenv("TOY_OPTIMIZER", "adamw")
    monkeypatch.delenv("TOY_MISSING", raising=False)


def test_a_placeholder_is_filled_in_every_file(workspace: Workspace) -> None:
    workspace.image_folder(f"images/{SECRET}")
    workspace.lycoris["linear_dim"] = "{env:TOY_STEPS}"
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images/{env:TOY_SECRET}"}]
    config = workspace.load(max_train_steps="{env:TOY_STEPS}", tracker_run_name="run-{env:TOY_SECRET}-1")
    assert config.training.max_train_steps == 12
    assert config.tracking.tracker_run_name == f"run-{SECRET}-1"
    assert config.lycoris is not None
    assert config.lycoris.linear_dim == 12
    assert config.datasets[0].instance_data_dir == workspace.folder / "images" / SECRET


def test_a_placeholder_on_the_command_line_is_filled(workspace: Workspace) -> None:
    assert workspace.load("max_train_steps={env:TOY_STEPS}").training.max_train_steps == 12


def test_a_missing_variable_is_a_problem_of_its_key(workspace: Workspace) -> None:
    workspace.lycoris["apply_preset"] = {"target_module": ["{env:TOY_MISSING}"]}
    message = workspace.problems(tracker_run_name="{env:TOY_MISSING}")
    assert '  tracker_run_name  the environment variable "TOY_MISSING" is not set.' in message
    assert '  apply_preset.target_module[0]  the environment variable "TOY_MISSING" is not set.' in message


def test_the_value_is_in_no_message(workspace: Workspace) -> None:
    workspace.lycoris |= {"algo": "{env:TOY_SECRET}", "apply_preset": {"target_name": "({env:TOY_SECRET}"}}
    workspace.datasets = [
        {
            "id": "{env:TOY_SECRET}/x",
            "instance_data_dir": "{env:TOY_SECRET}",
            "crop_style": "{env:TOY_SECRET}",
        }
    ]
    message = workspace.problems(
        "--tracker_project_nam={env:TOY_SECRET}",
        model_family="{env:TOY_SECRET}",
        lycoris_config="lycoris.json",
        pretrained_model_name_or_path="/{env:TOY_SECRET}/a",
        init_lora="{env:TOY_SECRET}" * 10,
        output_dir="{env:TOY_SECRET}/{unknown}",
        optimizer_config="{env:TOY_SECRET}",
        validation_resolution="{env:TOY_SECRET}",
        resume_from_checkpoint="../{env:TOY_SECRET}",
    )
    assert SECRET not in message
    assert "verysecret" not in message
    assert "{env:TOY_SECRET}" in message


def test_the_value_is_not_in_the_resolved_configuration_but_its_placeholder(workspace: Workspace) -> None:
    workspace.image_folder(f"images/{SECRET}")
    workspace.lycoris["apply_preset"] = {"target_name": ["{env:TOY_SECRET}"]}
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images/{env:TOY_SECRET}"}]
    config = workspace.load(
        output_dir="{env:TOY_SECRET}/out",
        cache_dir_vae="{output_dir}/vae",
        validation_prompt="a {env:TOY_SECRET}",
    )
    text = json.dumps(config.resolved())
    assert SECRET not in text
    assert config.resolved()["validation_prompt"] == "a {env:TOY_SECRET}"
    assert config.resolved()["cache_dir_vae"] == str(workspace.folder / "{env:TOY_SECRET}" / "out" / "vae")
    assert str(config.checkpoint.output_dir) == str(workspace.folder / SECRET / "out")


def test_the_resolved_configuration_with_placeholders_can_be_loaded_again(workspace: Workspace) -> None:
    config = workspace.load(validation_prompt="a {env:TOY_SECRET}", optimizer="{env:TOY_OPTIMIZER}")
    workspace.text("again.json", json.dumps(config.resolved()))
    again = workspace.load_as_written(path=workspace.folder / "again.json")
    assert again.validation == config.validation
    assert again.resolved() == config.resolved()


def test_a_choice_from_the_environment_is_resolved_to_its_value(workspace: Workspace) -> None:
    assert workspace.load(optimizer="{env:TOY_OPTIMIZER}").resolved()["optimizer"] == "adamw"


def test_a_secret_in_a_key_that_is_not_supported_is_not_shown(workspace: Workspace) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", "aws_secret_access_key": SECRET}]
    message = workspace.problems(f"--hub_token={SECRET}", hub_tokn=SECRET, hub_token=SECRET)
    assert "hub_token" in message
    assert "hub_tokn" in message
    assert SECRET not in message


def test_a_number_or_a_choice_from_the_environment_is_no_secret(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_NUMBER", "1024")
    monkeypatch.setenv("TOY_CROP", "center")
    monkeypatch.setenv("TOY_SWITCH", "false")
    workspace.datasets = [
        {
            "id": "photos",
            "instance_data_dir": "images",
            "resolution": "{env:TOY_NUMBER}",
            "crop_style": "{env:TOY_CROP}",
            "disabled": "{env:TOY_SWITCH}",
        }
    ]
    workspace.load()
    assert redacted("1024 center false") == "1024 center false"


def test_the_values_of_a_compared_run_are_hidden_too(workspace: Workspace) -> None:
    workspace.write()
    workspace.config["output_dir"] = "other"
    workspace.text("other.json", json.dumps({**workspace.config, "validation_prompt": "{env:TOY_SECRET}"}))
    workspace.load(validation_compared_config="other.json", output_dir="mine", validation_prompt="a cat")
    assert redacted(SECRET) == "{env:TOY_SECRET}"

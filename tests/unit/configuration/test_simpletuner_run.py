"""A SimpleTuner run in our names, with a decision for every key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.simpletuner_run import translate_run
from simpletuner.helpers.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Workspace


def test_the_files_of_a_run_become_ours(workspace: Workspace) -> None:
    workspace.config |= {
        "--optimizer": "adamw_bf16",
        "seed": 7,
        "write_batch_size": 64,
        "model_type": "controlnet",
        "offset_noise": True,
        "hub_model_id": "me/mine",
        "base_model_precision": "int8-quanto",
        "validation_prompt": "a {env:THING}",
    }
    workspace.lycoris = {"algo": "lokr", "multiplier": 1.0, "linear_alpha": 1}
    workspace.datasets = [
        {"id": "photos", "instance_data_dir": "images", "write_batch_size": 1, "repeats": 3},
        {"id": "t", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache", "default": True},
    ]
    run = translate_run(workspace.write(), families=workspace.families)
    assert run.config == {
        "model_family": "toy",
        "lora_type": "lycoris",
        "max_train_steps": 10,
        "optimizer": "adamw",
        "optimizer_config": {"betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01},
        "offset_noise": True,
        "seed": 7,
        "hub_model_id": "me/mine",
        "base_model_precision": "int8-torchao",
        "validation_prompt": "a {env:THING}",
        "defaults": "simpletuner",
    }
    assert run.datasets == [
        {"id": "photos", "instance_data_dir": "images", "repeats": 3},
        {"id": "t", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache", "default": True},
    ]
    assert run.lycoris == workspace.lycoris | {"linear_dim": 10_000, "bypass_mode": True}
    outcomes = {each.key: each.outcome for each in run.decisions}
    same = ["model_family", "lora_type", "max_train_steps", "seed", "hub_model_id", "validation_prompt"]
    same += [f"photos.{key}" for key in ("id", "instance_data_dir", "repeats")]
    same += [f"t.{key}" for key in ("id", "type", "dataset_type", "cache_dir", "default")]
    same += [f"lycoris.{key}" for key in ("algo", "multiplier", "linear_alpha")]
    translated = ["optimizer", "base_model_precision", "linear_dim", "bypass_mode"]
    translated += ["data_backend_config", "lycoris_config", "defaults"]
    assert outcomes == {
        **dict.fromkeys(same, "same"),
        **dict.fromkeys(translated, "translated"),
        **dict.fromkeys(["write_batch_size", "photos.write_batch_size"], "no effect"),
        "offset_noise": "same",
        "model_type": "not translated",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning_type": "controlnet"},
        {"source_dataset_id": "photos"},
        {"dataset_type": "video"},
        {"type": "aws"},
    ],
    ids=range(4),
)
def test_an_entry_that_is_no_training_target_is_left_out(
    workspace: Workspace, changes: dict[str, object]
) -> None:
    workspace.datasets.append({"id": "others", "instance_data_dir": "images"} | changes)
    run = translate_run(workspace.write(), families=workspace.families)
    assert [entry["id"] for entry in run.datasets] == ["photos"]
    assert "others.id" in {each.key for each in run.decisions if each.outcome == "not translated"}


def test_held_out_images_stay(workspace: Workspace) -> None:
    workspace.config |= {"eval_steps_interval": 50, "num_eval_images": 4}
    held_out = {"id": "others", "instance_data_dir": "images", "dataset_type": "eval"}
    workspace.datasets.append(held_out | {"repeats": 3})
    run = translate_run(workspace.write(), families=workspace.families)
    assert [entry["id"] for entry in run.datasets] == ["photos", "others"]
    assert run.datasets[1]["dataset_type"] == "eval"
    assert (run.config["eval_steps_interval"], run.config["num_eval_images"]) == (50, 4)


def test_references_stay(workspace: Workspace) -> None:
    workspace.config["conditioning_multidataset_sampling"] = "combined"
    workspace.datasets[0] |= {"conditioning_data": "before"}
    reference = {"id": "before", "instance_data_dir": "images", "conditioning_type": "reference_strict"}
    workspace.datasets.append(reference)
    run = translate_run(workspace.write(), families=workspace.families)
    assert run.config["conditioning_multidataset_sampling"] == "combined"
    assert run.datasets[0]["conditioning_data"] == "before"
    assert run.datasets[1] == reference


def test_regularisation_data_stays(workspace: Workspace) -> None:
    workspace.datasets.append({"id": "class", "instance_data_dir": "images", "is_regularization_data": True})
    run = translate_run(workspace.write(), families=workspace.families)
    assert run.datasets[-1]["id"] == "class"
    assert run.datasets[-1]["is_regularisation_data"] is True


def test_an_entry_that_another_names_as_its_condition_is_left_out(workspace: Workspace) -> None:
    workspace.datasets = [
        {"id": "photos", "instance_data_dir": "images", "conditioning_data": ["before"]},
        {"id": "before", "instance_data_dir": "images"},
    ]
    run = translate_run(workspace.write(), families=workspace.families)
    assert [entry["id"] for entry in run.datasets] == ["photos"]


def test_a_file_that_is_named_and_not_there_is_a_decision(workspace: Workspace) -> None:
    path = workspace.write()
    (workspace.folder / "data.json").unlink()
    run = translate_run(path, families=workspace.families)
    assert not run.datasets
    assert "data_backend_config" in {each.key for each in run.decisions if each.outcome == "not translated"}


def test_what_was_translated_is_valid(workspace: Workspace) -> None:
    workspace.config |= {"optimizer": "adamw_bf16", "validation_steps": 5, "lr_warmup_steps": ""}
    run = translate_run(workspace.write(), families=workspace.families)
    workspace.config = {**run.config, "data_backend_config": run.datasets, "lycoris_config": run.lycoris}
    assert workspace.load().validation.validation_step_interval == 5
    assert [each.key for each in workspace.load().decisions] == ["seed"]


def test_a_file_that_cannot_be_read_is_an_error(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        translate_run(workspace.text("config.json", "[]"), families=workspace.families)
    with pytest.raises(ConfigError, match="not found"):
        translate_run(workspace.folder / "no.json", families=workspace.families)
    workspace.config |= {"data_backend_config": "data.json"}
    path = workspace.write()
    workspace.text("data.json", json.dumps([])[:1])
    with pytest.raises(ConfigError, match=r"data\.json"):
        translate_run(path, families=workspace.families)


def test_a_file_is_found_by_a_variable_which_stays_as_it_is_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_DATA", "data")
    path = workspace.write()
    config = json.loads(path.read_text())
    name = config["data_backend_config"]
    assert name.startswith("data")
    config |= {
        "data_backend_config": name.replace("data", "{env:TOY_DATA}", 1),
        "validation_prompt": "{env:TOY_DATA}",
    }
    path.write_text(json.dumps(config))
    run = translate_run(path, families=workspace.families)
    assert run.datasets
    assert run.config["validation_prompt"] == "{env:TOY_DATA}"

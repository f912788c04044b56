"""validation_compared_config: another run's config.json, checked with this run's."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Workspace

KEY = "validation_compared_config"


def write_other(workspace: Workspace, name: str = "other.json", **changes: object) -> Path:
    """A valid run of another output folder, with these keys changed."""
    return workspace.text(name, json.dumps(workspace.config | {"output_dir": "other-output"} | changes))


def test_other_run_is_loaded_whole_and_without_the_arguments_of_the_command_line(
    workspace: Workspace,
) -> None:
    write_other(workspace, learning_rate=0.5)
    run = workspace.load("learning_rate=0.25", "max_train_steps=3", validation_compared_config="other.json")
    other = run.compared_with
    assert other is not None
    assert other.source == workspace.folder / "other.json"
    assert (run.optimizer.learning_rate, other.optimizer.learning_rate) == (0.25, 0.5)
    assert (run.training.max_train_steps, other.training.max_train_steps) == (3, 10)
    assert other.checkpoint.output_dir == workspace.folder / "other-output"


def test_other_run_is_found_beside_the_file_that_names_it(workspace: Workspace) -> None:
    elsewhere = workspace.folder / "elsewhere"
    elsewhere.mkdir()
    workspace.write()
    config = workspace.config | {KEY: "beside.json"}
    workspace.text("elsewhere/config.json", json.dumps(config))
    write_other(workspace, "elsewhere/beside.json")
    run = workspace.load_as_written(path=elsewhere / "config.json")
    assert run.compared_with is not None
    assert run.compared_with.source == elsewhere / "beside.json"


@pytest.mark.parametrize("value", [None, "null", ""])
def test_no_other_run_is_the_default(workspace: Workspace, value: object) -> None:
    assert workspace.load(validation_compared_config=value).compared_with is None


def test_mistakes_of_both_runs_are_told_at_once(workspace: Workspace) -> None:
    workspace.text("others.json", json.dumps(workspace.lycoris | {"linear_dim": 0}))
    write_other(workspace, lerning_rate=1, lycoris_config="others.json")
    problems = workspace.problems(validation_compared_config="other.json", seed="x")
    assert "config.json: 1 problem\n  seed" in problems
    assert "other.json: 1 problem\n  lerning_rate  unknown key. Did you mean learning_rate?" in problems
    assert "others.json: 1 problem\n  linear_dim" in problems


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_other_file_that_is_no_configuration_is_told(workspace: Workspace, text: str) -> None:
    workspace.text("other.json", text)
    assert workspace.problems(validation_compared_config="other.json").startswith("other.json: 1 problem")


@pytest.mark.parametrize("value", ["config.json", "./elsewhere/../config.json", "link.json"])
def test_run_compared_with_itself_is_refused(workspace: Workspace, value: str) -> None:
    (workspace.folder / "elsewhere").mkdir()
    (workspace.folder / "link.json").symlink_to(workspace.write())
    problems = workspace.problems(validation_compared_config=value)
    assert f"{KEY}  config.json -> {os.path.normpath(value)}: " in problems


def test_circle_is_refused_at_the_file_that_closes_it(workspace: Workspace) -> None:
    write_other(workspace, validation_compared_config="third.json")
    write_other(workspace, "third.json", output_dir="third-output", validation_compared_config="other.json")
    problems = workspace.problems(validation_compared_config="other.json")
    assert problems.startswith("third.json: 1 problem\n")
    assert f"{KEY}  other.json -> third.json -> other.json: " in problems


def test_chain_of_runs_is_loaded_to_its_end(workspace: Workspace) -> None:
    write_other(workspace, validation_compared_config="third.json")
    write_other(workspace, "third.json", output_dir="third-output")
    run = workspace.load(validation_compared_config="other.json")
    assert run.compared_with is not None
    assert run.compared_with.compared_with is not None
    assert run.compared_with.compared_with.source.name == "third.json"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"pretrained_model_name_or_path": "some/other"},
            'that run\'s pretrained_model_name_or_path is "some/other", here it is "somebody/toy-small".',
        ),
        ({"prediction_type": "epsilon"}, 'that run\'s prediction_type is "epsilon", here it is null.'),
        ({"output_dir": "output"}, f"{KEY}  that run has the same output_dir."),
        (
            {"lora_type": "standard", "lora_init_type": "pissa"},
            "that run's lora_init_type pissa changes the base weights. Name another run.",
        ),
    ],
)
def test_run_that_cannot_be_shown_beside_this_one_is_refused(
    workspace: Workspace, changes: dict[str, object], problem: str
) -> None:
    write_other(workspace, **changes)
    found = workspace.problems(validation_compared_config="other.json", output_dir="output")
    assert "config.json: 1 problem\n" in found
    assert problem in found


def test_same_model_named_in_two_ways_is_the_same(workspace: Workspace) -> None:
    write_other(workspace, pretrained_model_name_or_path="somebody/toy-small")
    assert workspace.load(validation_compared_config="other.json").compared_with is not None


def test_run_of_another_family_is_refused(workspace: Workspace) -> None:
    spec = workspace.families["toy"]
    workspace.families = {"toy": spec, "game": spec}
    write_other(workspace, model_family="game")
    found = workspace.problems(validation_compared_config="other.json")
    assert 'that run\'s model_family is "game", here it is "toy".' in found


def test_resolved_configuration_names_the_other_run_and_does_not_contain_it(workspace: Workspace) -> None:
    other = write_other(workspace)
    resolved = workspace.load(validation_compared_config="other.json").resolved()
    assert resolved[KEY] == str(other)
    assert "compared_with" not in resolved

"""The order in which values count, and how the command line is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace


def test_keys_are_read_with_and_without_leading_dashes(workspace: Workspace) -> None:
    workspace.config = {f"--{key}": value for key, value in workspace.config.items()}
    config = workspace.load(**{"--seed": 3, "train_batch_size": 2})
    assert (config.training.seed, config.training.train_batch_size) == (3, 2)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("validation_steps", "validation_step_interval", 7),
        ("checkpointing_steps", "checkpoint_step_interval", 8),
        ("save_total_limit", "checkpoints_total_limit", 9),
        ("--model_flavor", "model_flavour", "large"),
    ],
)
def test_an_older_name_of_a_key_is_read(workspace: Workspace, old: str, new: str, value: object) -> None:
    assert workspace.load(**{old: value}).resolved()[new] == value


@pytest.mark.parametrize(
    ("first", "second"), [("seed", "--seed"), ("validation_steps", "validation_step_interval")]
)
def test_a_key_under_two_names_is_given_twice(workspace: Workspace, first: str, second: str) -> None:
    message = workspace.problems(**{first: 1, second: 2})
    assert f"given twice, as {first} and as {second}. Keep one." in message


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(workspace: Workspace) -> None:
    config = workspace.load("train_batch_size=3", train_batch_size=2, gradient_accumulation_steps=4)
    assert config.training.train_batch_size == 3
    assert config.training.gradient_accumulation_steps == 4
    assert config.training.seed == 42


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=7"],
        ["--seed=7"],
        ["--seed", "7"],
        ["seed=1", "--seed", "7"],
        ["--validation_disable", "seed=7"],
    ],
    ids=" ".join,
)
def test_an_override_is_read_in_each_way_of_writing(workspace: Workspace, arguments: list[str]) -> None:
    assert workspace.load(*arguments).training.seed == 7


def test_a_key_alone_is_true_and_takes_a_switch_word_that_follows(workspace: Workspace) -> None:
    assert workspace.load("--validation_disable").validation.validation_disable is True
    assert workspace.load("--gradient_checkpointing", "false").training.gradient_checkpointing is False
    assert workspace.load("--validation_disable", "--seed", "3").training.seed == 3


def test_an_older_name_on_the_command_line_wins_over_the_newer_in_the_file(workspace: Workspace) -> None:
    config = workspace.load("validation_steps=5", validation_step_interval=9)
    assert config.validation.validation_step_interval == 5


def test_values_may_hold_equals_signs_and_negative_numbers(workspace: Workspace) -> None:
    config = workspace.load("--optimizer_config", "weight_decay=0.5,eps=1e-7", "--validation_seed", "-3")
    assert config.optimizer.optimizer_config == {"weight_decay": 0.5, "eps": 1e-7}
    assert config.validation.validation_seed == -3


def test_a_prompt_that_begins_like_json_stays_a_text(workspace: Workspace) -> None:
    config = workspace.load("validation_prompt=[V] cat", "instance_prompt={a} dog")
    assert config.validation.validation_prompt == "[V] cat"
    assert config.data.instance_prompt == "{a} dog"


def test_lists_and_objects_are_read_as_json(workspace: Workspace) -> None:
    config = workspace.load('peft_lora_target_modules=["a", "b"]', 'optimizer_config={"eps": 1e-3}')
    assert config.adapter.peft_lora_target_modules == ("a", "b")
    assert config.optimizer.optimizer_config == {"eps": 1e-3}


@pytest.mark.parametrize("word", ["none", "null", "None"])
def test_none_on_the_command_line_takes_a_value_of_the_file_away(workspace: Workspace, word: str) -> None:
    config = workspace.load(
        f"report_to={word}",
        f"max_train_steps={word}",
        f"train_batch_size={word}",
        report_to="wandb",
        max_train_steps=9,
        train_batch_size=4,
    )
    assert config.tracking.report_to == ()
    assert config.training.max_train_steps is None
    assert config.training.train_batch_size == 1


def test_an_unknown_override_names_the_command_line_and_the_nearest_key(workspace: Workspace) -> None:
    message = workspace.problems("--lerning_rate", "3")
    assert message == "command line: 1 problem\n  lerning_rate  unknown key. Did you mean learning_rate?"


def test_a_unique_prefix_is_no_key(workspace: Workspace) -> None:
    assert "unknown key" in workspace.problems("--train_batch=3")


def test_an_argument_that_is_no_override_is_refused(workspace: Workspace) -> None:
    message = workspace.problems("seed")
    assert message == "command line: 1 problem\n  seed  an argument is not key=value. Write seed=value."


def test_a_wrong_value_of_the_command_line_is_reported_there(workspace: Workspace) -> None:
    message = workspace.problems("train_batch_size=0", train_batch_size=-1)
    assert message == 'command line: 1 problem\n  train_batch_size  "0": must be at least 1.'

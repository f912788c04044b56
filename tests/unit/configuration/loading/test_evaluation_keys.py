"""Held-out images in the files: dataset_type eval, eval_share and the keys of evaluations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.schema.datasets import slider_strengths, subjects_of

if TYPE_CHECKING:
    from conftest import Workspace

HELD_OUT = {"id": "others", "instance_data_dir": "images", "dataset_type": "eval"}


def test_an_entry_of_held_out_images_is_no_training_target(workspace: Workspace) -> None:
    workspace.datasets.append(HELD_OUT | {"slider_strength": 2})
    run = workspace.load()
    assert [each.is_trained for each in run.datasets] == [True, False]
    assert [each.id for each in subjects_of(run.datasets)] == ["photos"]
    assert slider_strengths(run.datasets) == ()
    assert run.evaluates
    assert not run.decisions


def test_held_out_images_inherit_as_others_do(workspace: Workspace) -> None:
    workspace.datasets.append(HELD_OUT)
    _, others = workspace.load(resolution=256, instance_prompt="a photo", eval_share=0.5).datasets
    assert (others.resolution, others.instance_prompt, others.eval_share) == (256, "a photo", 0)


def test_keys_of_training_have_no_effect_on_held_out_images(workspace: Workspace) -> None:
    keys = {"repeats": 5, "probability": 0.5, "caption_dropout_probability": 0.1, "eval_share": 0.5}
    workspace.datasets.append(HELD_OUT | keys)
    run = workspace.load()
    assert {each.key for each in run.decisions} == {f"others.{key}" for key in keys}
    assert {each.outcome for each in run.decisions} == {"no effect"}
    others = run.datasets[1]
    assert (others.repeats, others.probability, others.caption_dropout_probability) == (0, 1, None)


def test_resolved_configuration_of_held_out_images_says_nothing_of_its_keys(workspace: Workspace) -> None:
    workspace.datasets.append(HELD_OUT)
    resolved = workspace.load().resolved()
    workspace.config = resolved
    assert workspace.load().datasets[1].is_trained is False
    assert not [each for each in workspace.load().decisions if "others" in each.key]


def test_a_share_of_config_json_counts_for_every_dataset_but_regularisation(workspace: Workspace) -> None:
    workspace.datasets += [
        {"id": "own", "instance_data_dir": "images", "eval_share": 0.2},
        {"id": "none", "instance_data_dir": "images", "eval_share": 0},
        {"id": "class", "instance_data_dir": "images", "is_regularisation_data": True},
    ]
    run = workspace.load(eval_share="0.1")
    assert [each.eval_share for each in run.datasets] == [0.1, 0.2, 0, 0]
    assert [each.holds_out for each in run.datasets] == [True, True, False, False]


def test_nothing_is_evaluated_without_held_out_images(workspace: Workspace) -> None:
    assert not workspace.load().evaluates
    assert not workspace.load(eval_share=0.1, eval_loss_disable=True).evaluates


@pytest.mark.parametrize(
    ("entry", "pattern"),
    [
        ({"eval_share": 1}, r"photos.eval_share  1: .*less than 1|photos.eval_share  1: .*below 1"),
        ({"eval_share": -0.1}, "photos.eval_share  -0.1: .* 0"),
        ({"eval_share": "some"}, "photos.eval_share  .*number"),
        (
            {"is_regularisation_data": True, "eval_share": 0.5},
            "photos.eval_share  images of regularisation are not evaluated",
        ),
    ],
    ids=["whole", "negative", "text", "regularisation"],
)
def test_a_share_that_cannot_be_is_named(
    workspace: Workspace, entry: dict[str, object], pattern: str
) -> None:
    workspace.datasets = [
        {"id": "subject", "instance_data_dir": "images"},
        {"id": "photos", "instance_data_dir": "images"} | entry,
    ]
    assert re.search(pattern, workspace.problems())


def test_held_out_images_alone_are_refused(workspace: Workspace) -> None:
    assert "no enabled image dataset" in workspace.dataset_problems(HELD_OUT)


def test_held_out_images_of_regularisation_are_refused(workspace: Workspace) -> None:
    message = workspace.dataset_problems(*workspace.datasets, HELD_OUT | {"is_regularisation_data": True})
    assert "others.dataset_type  images of regularisation are not evaluated" in message


def test_one_dataset_is_chosen_by_its_id(workspace: Workspace) -> None:
    workspace.datasets.append(HELD_OUT)
    assert workspace.load(eval_dataset_id="others").evaluation.eval_dataset_id == ("others",)
    assert workspace.load(eval_dataset_id=["others"]).evaluation.eval_dataset_id == ("others",)
    assert workspace.load(eval_dataset_id=None).evaluation.eval_dataset_id == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other", "no dataset has this id. Did you mean others?"),
        ("photos", 'holds no images out. Set "dataset_type": "eval" or eval_share'),
        ("sizes", "no dataset has this id. Known: others, sizes-256, sizes-512."),
        ("text", "no dataset has this id. Known: others, sizes-256, sizes-512."),
    ],
)
def test_a_dataset_without_held_out_images_is_not_chosen(workspace: Workspace, name: str, says: str) -> None:
    workspace.datasets += [
        HELD_OUT,
        HELD_OUT | {"id": "sizes", "resolution": [256, 512]},
        {"id": "text", "dataset_type": "text_embeds"},
    ]
    message = workspace.problems(eval_dataset_id=name)
    assert f'eval_dataset_id  "{name}": {says}' in message


def test_an_invalid_entry_is_named_once(workspace: Workspace) -> None:
    workspace.config["eval_dataset_id"] = "others"
    message = workspace.dataset_problems(*workspace.datasets, HELD_OUT | {"crop": "perhaps"})
    assert "eval_dataset_id" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_eval_images", 0),
        ("eval_timesteps", 0),
        ("eval_steps_interval", -1),
        ("eval_epoch_interval", 0.5),
    ],
)
def test_numbers_that_cannot_be_are_named(workspace: Workspace, key: str, value: object) -> None:
    assert f"{key}  {value}: " in workspace.problems(**{key: value})

"""Prompts of validations."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.loading.prompts import LIBRARY

if TYPE_CHECKING:
    from conftest import Workspace


def prompts(workspace: Workspace, **changes: object) -> list[tuple[str, str, float | None]]:
    return [(each.name, each.text, each.strength) for each in workspace.load(**changes).validation.prompts]


def test_without_a_prompt_there_are_none(workspace: Workspace) -> None:
    assert prompts(workspace) == []


def test_one_prompt_is_named_validation(workspace: Workspace) -> None:
    assert prompts(workspace, validation_prompt="a cat") == [("validation", "a cat", None)]


def test_the_library_comes_after_it(workspace: Workspace) -> None:
    found = prompts(workspace, validation_prompt="a cat", validation_prompt_library="true")
    assert [name for name, _, _ in found] == ["validation", *LIBRARY]
    assert len({text for _, text, _ in found}) == len(LIBRARY) + 1


def test_a_users_library_gives_prompts_with_and_without_a_strength(workspace: Workspace) -> None:
    library = {
        "one": "a dog",
        "two": {"prompt": "a bird", "adapter_strength": "0.5"},
        "three": {"prompt": "a fish"},
    }
    workspace.text("prompts.json", json.dumps(library))
    found = prompts(workspace, user_prompt_library="prompts.json")
    assert found == [("one", "a dog", None), ("two", "a bird", 0.5), ("three", "a fish", None)]


def test_a_users_prompt_replaces_one_of_the_same_name(workspace: Workspace) -> None:
    workspace.text("prompts.json", json.dumps({"portrait": "a dog", "validation": "a bird"}))
    changes = {
        "validation_prompt": "a cat",
        "validation_prompt_library": True,
        "user_prompt_library": "prompts.json",
    }
    found = prompts(workspace, **changes)
    assert ("portrait", "a dog", None) in found
    assert found[0] == ("validation", "a bird", None)
    assert len(found) == len(LIBRARY) + 1


@pytest.mark.parametrize(
    ("library", "text"),
    [
        ([], "object of name and prompt"),
        ({}, "user_prompt_library"),
        ({"a": 3}, "a  3: "),
        ({"a": ""}, 'a.prompt  "": '),
        ({"a": {"prompts": "x"}}, "a.prompts  unknown key. Did you mean prompt?"),
        ({"a": {"adapter_strength": 1}}, "a.prompt  null: "),
        ({"a": {"prompt": "x", "adapter_strength": "much"}}, 'a.adapter_strength  "much": '),
        ({"a": {"prompt": "x", "adapter_strength": "inf"}}, "a.adapter_strength"),
        ({"a": {"prompt": "x", "adapter_strength": True}}, "a.adapter_strength  true: "),
    ],
)
def test_a_library_that_does_not_fit_says_what_to_do(
    workspace: Workspace, library: object, text: str
) -> None:
    workspace.text("prompts.json", json.dumps(library))
    message = workspace.problems(user_prompt_library="prompts.json")
    assert "prompts.json: " in message
    assert text in " ".join(message.split(" ")).replace("   ", "  ")


def test_a_missing_library_is_refused(workspace: Workspace) -> None:
    assert "user_prompt_library  " in workspace.problems(user_prompt_library="none.json")


def images(workspace: Workspace, **changes: object) -> dict[str, list[str]]:
    found = workspace.load(**changes).validation.prompts
    return {each.name: [str(file.relative_to(workspace.folder)) for file in each.images] for each in found}


def takes_references(workspace: Workspace) -> Workspace:
    """The workspace, whose images lie in its folder and whose model takes reference images."""
    workspace.image_folder("shots", ["a.png", "b.png"])
    (spec,) = workspace.families.values()
    workspace.families = {spec.name: replace(spec, reference_flavours=frozenset({"small"}))}
    return workspace


def test_reference_images_are_those_of_the_prompt_else_those_of_all(workspace: Workspace) -> None:
    library = {
        "own": {"prompt": "make it red", "image": "shots/b.png"},
        "several": {"prompt": "put both together", "image": ["shots/b.png", "shots/a.png"]},
        "shared": "make it blue",
        "none": {"prompt": "a cat", "image": []},
    }
    workspace.text("prompts.json", json.dumps(library))
    keys = {"validation_prompt": "make it old", "user_prompt_library": "prompts.json"}
    found = images(takes_references(workspace), validation_reference_images="shots/a.png", **keys)
    assert found == {
        "validation": ["shots/a.png"],
        "own": ["shots/b.png"],
        "several": ["shots/b.png", "shots/a.png"],
        "shared": ["shots/a.png"],
        "none": [],
    }
    again = images(workspace, validation_reference_images=["shots/a.png", "shots/b.png"])
    assert again["shared"] == ["shots/a.png", "shots/b.png"]
    assert images(workspace, validation_reference_images=None)["shared"] == []


@pytest.mark.parametrize("value", ["shots/none.png", "shots", ["shots/a.png", 3], 3])
def test_reference_images_that_are_no_files_are_named(workspace: Workspace, value: object) -> None:
    workspace.text("prompts.json", json.dumps({"one": {"prompt": "x", "image": value}}))
    keys = {"user_prompt_library": "prompts.json", "validation_reference_images": value}
    message = takes_references(workspace).problems(validation_prompt="a cat", **keys)
    assert "prompts.json: 1 problem" in message
    assert "  one.image" in message
    assert "  validation_reference_images" in message


@pytest.mark.parametrize("key", ["validation_reference_images", "user_prompt_library"])
@pytest.mark.parametrize("chosen", [{}, {"model_flavour": "large"}], ids=["default", "flavour"])
def test_reference_images_of_a_model_that_takes_none_are_refused(
    workspace: Workspace, key: str, chosen: dict[str, object]
) -> None:
    workspace.text("prompts.json", json.dumps({"one": {"prompt": "x", "image": "shots/a.png"}}))
    values = {"validation_reference_images": "shots/a.png", "user_prompt_library": "prompts.json"}
    takes_references(workspace)
    (spec,) = workspace.families.values()
    others = frozenset({"large"} if not chosen else {"small"})
    workspace.families = {spec.name: replace(spec, reference_flavours=others)}
    message = workspace.problems(validation_prompt="a cat", **{key: values[key]}, **chosen)
    assert f"  {key}  " in message
    assert f"model_flavour to {min(others)}" in message

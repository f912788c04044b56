"""Prompts of validations."""

from __future__ import annotations

import json
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

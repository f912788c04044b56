"""Filters of captions from lists and files, and the object of their order."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace


def dataset(**keys: object) -> list[object]:
    return [{"id": "photos", "instance_data_dir": "images", **keys}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("filter.txt", "a photo of \n\ns/cat/dog/\r\n"),
        ("filter.json", json.dumps(["a photo of ", "s/cat/dog/"])),
    ],
)
def test_filters_come_from_a_list_or_a_file(workspace: Workspace, name: str, text: str) -> None:
    expected = ("a photo of ", "s/cat/dog/")
    workspace.text(name, text)
    for value in (name, list(expected)):
        workspace.datasets = dataset(caption_filter_list=value)
        (found,) = workspace.load().datasets
        assert found.caption_filter_list == expected
    workspace.datasets = dataset(caption_filter_list="")
    assert workspace.load().datasets[0].caption_filter_list == ()


def test_filters_of_the_text_embeds_entry_stand_before_a_datasets_own(workspace: Workspace) -> None:
    workspace.text("filter.txt", "one\ntwo")
    embeds = {"id": "embeds", "dataset_type": "text_embeds", "caption_filter_list": "filter.txt"}
    other = {"id": "other", "instance_data_dir": "images"}
    workspace.datasets = [*dataset(caption_filter_list=["three"]), other, embeds]
    first, second = workspace.load().datasets
    assert first.caption_filter_list == ("one", "two", "three")
    assert second.caption_filter_list == ("one", "two")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (["a", "b(c"], ["entry 2", "b(c", "character 2"]),
        (["s/b(c/d/", "[", "fine"], ["entry 1", "character 4", "entry 2", "character 1"]),
        ([r"s/(a)/\2/"], ["entry 1", "group"]),
        (["s/a/b/c/"], ["entry 1", "s/search/replacement/"]),
        (["s/a/b/i"], ["entry 1", "s/search/replacement/"]),
        (["s//b/"], ["entry 1", "empty"]),
        ([""], ["entry 1", "empty"]),
        ([1], ["list of texts"]),
        ({"a": 1}, ["list of texts"]),
        ("missing.txt", ["missing.txt", "not found"]),
        ("images", ["is a folder"]),
        ("filter.csv", [".txt", ".json"]),
        ("broken.json", ["line 1, column 6"]),
        ("object.json", ["list of texts"]),
        ("latin.txt", ["UTF-8"]),
    ],
)
def test_filters_that_cannot_be_used_are_named_with_their_place(
    workspace: Workspace, value: object, parts: list[str]
) -> None:
    workspace.text("filter.csv", "a")
    workspace.text("broken.json", '["a",]')
    workspace.text("object.json", '{"a": "b"}')
    (workspace.folder / "latin.txt").write_bytes(b"na\xefve")
    workspace.datasets = dataset(caption_filter_list=value)
    message = workspace.problems()
    assert message.count("photos.caption_filter_list") == 1
    for part in parts:
        assert part in message


def test_a_shuffle_is_an_object_or_a_switch(workspace: Workspace) -> None:
    values = ({"enable": True}, True, "true", {}, False, None)
    workspace.datasets = [
        {"id": f"d{number}", "instance_data_dir": "images", "caption_shuffle": value}
        for number, value in enumerate(values)
    ]
    found = [each.caption_shuffle for each in workspace.load().datasets]
    assert [each.enable for each in found] == [True, True, True, False, False, False]
    assert {(each.count, each.split_on, each.position_start, each.include_original) for each in found} == {
        (1, "comma", 0, True)
    }


def test_every_mistake_of_a_shuffle_is_listed_at_once(workspace: Workspace) -> None:
    shuffle = {"enable": True, "count": 0, "split_on": "semicolon", "position_start": -1, "cuont": 2}
    workspace.datasets = dataset(
        caption_shuffle=shuffle, caption_filter_list=["("], caption_tag_dropout_rate=2
    )
    message = workspace.problems(caption_variants=0)
    for part in (
        "photos.caption_shuffle.count  0",
        "photos.caption_shuffle.split_on",
        "comma, space, period",
        "photos.caption_shuffle.position_start  -1",
        "photos.caption_shuffle.cuont  unknown key. Did you mean count?",
        "photos.caption_filter_list",
        "photos.caption_tag_dropout_rate  2",
        "caption_variants  0",
    ):
        assert part in "\n".join("  ".join(line.split(maxsplit=1)) for line in message.splitlines())


@pytest.mark.parametrize(("value", "expected"), [(150, 150), ("225", 225), (75, 75)])
def test_the_length_of_prompts_is_a_number_of_chunks(
    workspace: Workspace, value: object, expected: int
) -> None:
    assert workspace.load(max_token_length=value).model.max_token_length == expected


@pytest.mark.parametrize("value", [77, 0, "long", True, 512])
def test_another_length_of_prompts_is_refused(workspace: Workspace, value: object) -> None:
    message = workspace.problems(max_token_length=value)
    assert "max_token_length" in message
    assert "75, 150, 225" in message

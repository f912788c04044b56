"""JSON with the slips that people make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import LARGEST_FILE_BYTES, parse_json, read_json

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


def parsed(text: str) -> tuple[object, list[str]]:
    problems = Problems()
    value = parse_json(text, source="file", problems=problems)
    return value, [" ".join(line.split()) for line in problems.message().splitlines()[1:]]


@settings(max_examples=300, deadline=None)
@given(JSON_VALUES, st.sampled_from([None, 2]), st.booleans())
def test_valid_json_reads_as_the_standard_library_reads_it(
    value: object, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parsed(text) == (json.loads(text), [])


def test_whole_numbers_and_floats_keep_their_kind() -> None:
    value, _ = parsed('{"a": 1, "b": 1.0, "c": 1e0, "d": -0.5}')
    assert isinstance(value, dict)
    assert [type(each) for each in value.values()] == [int, float, float, float]


def is_about(problem: str, place: str, found: str) -> bool:
    """Whether a problem stands at a place and names what was found there."""
    return problem.startswith(f"{place} ") and found in problem


@pytest.mark.parametrize(
    ("text", "value", "place", "found"),
    [
        ('{"a": 1,\n "b": 2,\n}', {"a": 1, "b": 2}, "line 2, column 8", "}"),
        ("[1, 2, ]", [1, 2], "line 1, column 6", "]"),
        ('{"a": 1\n "b": 2}', {"a": 1, "b": 2}, "line 2, column 2", "comma"),
        ('{"a": 1,\n "a": 2}', {"a": 2}, "line 2, column 2", '"a"'),
        ('{"a": 1} // why', {"a": 1}, "line 1, column 10", "comment"),
        ('{/* b */"a": 1}', {"a": 1}, "line 1, column 2", "comment"),
        ('{"a": 1}\n# why', {"a": 1}, "line 2, column 1", "comment"),
        ('{"a": True}', {"a": True}, "line 1, column 7", "True is not JSON. Write true."),
        ('{"a": None}', {"a": None}, "line 1, column 7", "None is not JSON. Write null."),
        ('{"a": "C:\\data\\new"}', {"a": "C:\\data\\new"}, "line 1, column 10", "\\\\, or use /"),
    ],
)
def test_a_slip_that_can_be_read_past_is_reported_with_its_place(
    text: str, value: object, place: str, found: str
) -> None:
    read, problems = parsed(text)
    assert read == value
    assert len(problems) == 1
    assert is_about(problems[0], place, found), problems


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("", "line 1, column 1", "empty"),
        ("  \n ", "line 2, column 2", "empty"),
        ('{"a": 1', "line 1, column 1", "{ has no closing }"),
        ('{"a":\n [1, 2', "line 2, column 2", "[ has no closing ]"),
        ('{"a":\n [1, 2}', "line 2, column 7", 'comma or ], found "}"'),
        ('{"a" 1}', "line 1, column 6", 'colon after the key "a"'),
        ("{a: 1}", "line 1, column 2", 'key in double quotes, found "a"'),
        ("{'a': 1}", "line 1, column 2", 'key in double quotes, found "\'"'),
        ('{"a": truly}', "line 1, column 7", 'value, found "t". Write a text in double quotes, "like this"'),
        ('{"a": NaN}', "line 1, column 7", 'value, found "N"'),
        ('{"a": 01}', "line 1, column 7", 'value, found "0"'),
        ('{"a": "one\ntwo"}', "line 1, column 7", "double quote"),
        ('{"a": 1} x', "line 1, column 10", '"x" after the end'),
        ("[" * 70 + "]" * 70, "line 1, column 65", "64"),
        ("9" * 5000, "line 1, column 1", "value"),
    ],
)
def test_json_that_cannot_be_read_names_the_place(text: str, place: str, found: str) -> None:
    value, problems = parsed(text)
    assert value is None
    assert len(problems) == 1
    assert is_about(problems[0], place, found), problems


def test_many_members_side_by_side_are_not_deep() -> None:
    text = json.dumps([[{"a": []}]] * 100)
    assert parsed(text) == (json.loads(text), [])


def test_several_slips_are_all_reported() -> None:
    value, problems = parsed('{"a": 1, "a": None, "b": [1,],}')
    assert value == {"a": None, "b": [1]}
    assert [int(problem.split()[3]) for problem in problems] == [10, 15, 28, 30]


def test_an_unquoted_text_is_not_repeated_in_the_message() -> None:
    _, problems = parsed('{"hub_token": hf_abcdefgh}')
    assert "bcdefgh" not in problems[0]


def test_half_a_surrogate_pair_is_reported() -> None:
    _, problems = parsed('{"a": "\\ud800"}')
    assert len(problems) == 1
    assert is_about(problems[0], "line 1, column 7", "surrogate")


def test_a_tab_within_a_text_is_read() -> None:
    assert parsed('{"prompt": "a cat\ton a mat"}') == ({"prompt": "a cat\ton a mat"}, [])


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf{}")
    problems = Problems()
    assert read_json(file, source="a", problems=problems) == {}
    assert len(problems) == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": "\xff"}', "UTF-8: byte 7 is 0xff"),
        (b" " * (LARGEST_FILE_BYTES + 1), "16 MiB"),
        (None, "not found"),
        (b" null\n", "null: "),
    ],
    ids=["encoding", "size", "missing", "null"],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    problems = Problems()
    assert read_json(file, source="a.json", problems=problems) is None
    heading, problem = problems.message().splitlines()
    assert heading == "a.json: 1 problem"
    assert text in problem


def test_a_folder_in_place_of_a_file_is_reported(tmp_path: Path) -> None:
    problems = Problems()
    assert read_json(tmp_path, source="a", problems=problems) is None
    assert "cannot be read: Is a directory." in problems.message()

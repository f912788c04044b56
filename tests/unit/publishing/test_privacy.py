"""Names stand in place of paths, and other texts stay."""

from __future__ import annotations

import json

import pytest

from simpletuner.helpers.publishing.privacy import without_paths


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/private/place/cat", "cat"),
        ("/private/place/cat/", "cat"),
        ("~/place/cat.json", "cat.json"),
        ("~somebody/cat", "cat"),
        ("./cat/dog", "dog"),
        ("../cat", "cat"),
        (r"C:\place\cat", "cat"),
        ("C:/place/cat", "cat"),
        (r"\\server\place\cat", "cat"),
        ({"a": ["/x/y", 1, None], "/p/q": True}, {"a": ["y", 1, None], "q": True}),
        (
            {"instance_data_dir": "s3://private/x", "aws_endpoint_url": "https://inside", "folder": "gs://b"},
            {"instance_data_dir": "(hidden)", "aws_endpoint_url": "(hidden)", "folder": "(hidden)"},
        ),
        ({"instance_data_dir": "/place/cat"}, {"instance_data_dir": "cat"}),
        (json.dumps({"a": "/x/y"}), '{"a": "y"}'),
    ],
)
def test_a_path_becomes_its_last_name(value: object, expected: object) -> None:
    assert without_paths(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "owner/name",
        "a cat / a dog",
        "/",
        "~",
        "1/2",
        "https://example.com/a",
        '{"a":  1}',
        "[not json",
        "",
        0.5,
    ],
)
def test_what_is_no_path_stays(value: object) -> None:
    assert without_paths(value) == value

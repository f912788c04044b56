"""--schedule of the command line."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.schema.schedule_options import schedule_options
from simpletuner.helpers.errors import ConfigError


def test_every_value_is_read_with_its_type() -> None:
    assert schedule_options("min_rank=8, alpha=0.5,kind=inclusive") == {
        "min_rank": 8,
        "alpha": 0.5,
        "kind": "inclusive",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "''"),
        ("rank=8", "rank"),
        ("min_rank=8,min_rank=9", "twice"),
        ("min_rank=8.5", "8.5"),
        ("alpha=steep", "steep"),
        ("kind=square", "cosine"),
        ("min_rank", "min_rank"),
    ],
)
def test_value_that_cannot_be_read_is_named_with_an_example(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        schedule_options(text)
    assert "--schedule" in str(caught.value)

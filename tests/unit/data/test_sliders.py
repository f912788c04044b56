"""Whether the directions of a slider balance."""

from __future__ import annotations

import pytest

from simpletuner.helpers.data.sliders import slider_problems


@pytest.mark.parametrize(
    ("draws", "found"),
    [
        ({}, None),
        ({0.5: 10, -0.5: 10}, None),
        ({0.5: 10, -0.25: 20}, None),
        ({0.5: 11, -0.5: 10}, None),
        ({0.5: 10, -0.5: 12}, "10 at slider_strength 0.5"),
        ({1.0: 4, 0.5: 4, -0.5: 4}, "4 at slider_strength -0.5, 4 at slider_strength 0.5, 4 at"),
        ({0.5: 10}, "positive in every"),
        ({-0.5: 10, -1.0: 3}, "negative in every"),
    ],
    ids=["none", "equal", "equal product", "nearly", "unequal", "three", "positive", "negative"],
)
def test_directions_that_do_not_balance_are_named(draws: dict[float, int], found: str | None) -> None:
    texts = list(slider_problems(draws))
    assert len(texts) == (found is not None)
    assert all(str(found) in text for text in texts)

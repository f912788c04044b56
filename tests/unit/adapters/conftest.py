"""What the tests of adapters share: no mask outlives a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simpletuner.helpers.adapters.tlora import mask


@pytest.fixture(autouse=True)
def _no_mask_left_behind() -> Iterator[None]:
    yield
    assert not mask.groups_with_mask(), "a test left a mask behind"

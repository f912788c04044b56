"""What the integration tests share: no mask outlives a test, and warm processes end with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simpletuner.helpers.adapters.tlora import mask
from tests.integration.processes import stop_server


@pytest.fixture(autouse=True)
def _no_mask_left_behind() -> Iterator[None]:
    yield
    assert not mask.groups_with_mask()
    assert not any(group.is_held for group in mask._groups.values())


@pytest.fixture(scope="session", autouse=True)
def _server_of_processes() -> Iterator[None]:
    yield
    stop_server()

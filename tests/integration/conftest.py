"""What the integration tests share: no mask outlives a test, and warm processes end with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simpletuner.helpers.adapters.tlora import mask
from tests.integration.processes import stop_server
from tests.integration.tiny_runs import TinyRun, common_caches


@pytest.fixture(autouse=True)
def _no_mask_left_behind() -> Iterator[None]:
    yield
    assert not mask.groups_with_mask()
    assert not any(group.is_held for group in mask._groups.values())


@pytest.fixture(scope="session", autouse=True)
def _server_of_processes() -> Iterator[None]:
    yield
    stop_server()


@pytest.fixture(scope="module")
def shared_caches() -> Iterator[None]:
    """For files that do not test encoding: an image or caption is encoded once for all their runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyRun, "caches", common_caches())
        yield


@pytest.fixture
def own_caches(shared_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of encoding in such a file."""
    monkeypatch.setattr(TinyRun, "caches", None)

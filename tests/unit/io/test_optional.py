"""Optional packages are imported on use."""

from __future__ import annotations

import json

import pytest

from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.io.optional import require


def test_require_gives_the_module() -> None:
    assert require("json", extra="data") is json


def test_require_names_the_extra_of_a_missing_package() -> None:
    with pytest.raises(MissingDependencyError, match=r'pip install "simpletuner\[track\]"'):
        require("no_such_module_anywhere", extra="track")

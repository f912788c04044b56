"""Optional packages are imported on use."""

from __future__ import annotations

import json

import pytest

from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.io.optional import check_installed, require


def test_require_gives_the_module() -> None:
    assert require("json", extra="data") is json


def test_require_names_the_extra_of_a_missing_package() -> None:
    with pytest.raises(MissingDependencyError, match=r'pip install "simpletuner-t\[track\]"'):
        require("no_such_module_anywhere", extra="track")


def test_check_installed_names_what_the_package_is_for_and_imports_nothing() -> None:
    check_installed("json", extra="data", needed_for="anything")
    with pytest.raises(MissingDependencyError, match=r"optimizer prodigy .*no_such_module"):
        check_installed("no_such_module", extra="optim", needed_for="optimizer prodigy")

"""Configurations of the examples, with other values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.models import registry

Example = Callable[..., RunConfig]


@pytest.fixture
def example(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    """Loads the configuration of an example by its name, with `key=value` overrides."""
    monkeypatch.chdir(repository)

    def load(name: str, *overrides: str) -> RunConfig:
        file = Path("config/examples") / name / "config.json"
        return load_config(file, overrides=overrides, families=registry.specs())

    return load

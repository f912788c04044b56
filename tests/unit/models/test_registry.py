"""The list of families, and their specs, read without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.registry import FAMILIES, load_family, specs


@pytest.mark.parametrize("name", FAMILIES)
def test_spec_of_a_family_is_consistent(name: str) -> None:
    found = specs()[name]
    assert found.name == name
    assert found.default_flavour in found.flavours
    assert found.default_resolution % found.pixel_alignment == 0
    assert found.pixel_alignment % found.minimum_alignment == 0
    assert found.prediction_types
    assert {"Attention", "FeedForward"} <= found.target_aliases.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_load_family_gives_a_class_with_the_same_spec(name: str) -> None:
    family = load_family(name)
    assert issubclass(family, ModelFamily)
    assert family.spec is specs()[name]


def test_load_family_names_the_known_ones_for_an_unknown_name() -> None:
    with pytest.raises(ModelError, match=r"'sdlx'.*sdxl"):
        load_family("sdlx")


def test_specs_are_read_without_torch() -> None:
    code = (
        "import sys; from simpletuner.helpers.models.registry import specs; specs();"
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

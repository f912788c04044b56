"""Records and their registries."""

from __future__ import annotations

import sys

import pytest

from simpletuner.helpers.choices.registry import Choice, Registry
from simpletuner.helpers.errors import MissingDependencyError


def record(name: str, *aliases: str, build: str = "math:sqrt", package: str = "") -> Choice:
    return Choice(name=name, aliases=aliases, summary="A test.", build=build, package=package, extra="track")


def test_a_record_is_found_by_name_and_alias() -> None:
    registry = Registry(first := record("first", "1st"), record("second"))
    assert registry.named("first") is registry.named("1st") is first
    assert registry.named("third") is None
    assert registry.named(["first"]) is None
    assert list(registry) == ["first", "second"]


@pytest.mark.parametrize("other", [record("first", build="math:log"), record("1st"), record("x", "first")])
def test_a_name_belongs_to_one_record(other: Choice) -> None:
    registry = Registry(record("first", "1st"))
    with pytest.raises(ValueError, match=r"'(first|1st)'"):
        registry.register(other)
    assert list(registry) == ["first"]


def test_the_same_record_may_be_registered_again() -> None:
    registry = Registry(record("first", "1st"))
    registry.register(record("first", "1st"))
    assert len(registry) == 1


def test_title_is_the_display_name_or_the_name() -> None:
    assert record("first").title == "first"
    assert Choice(name="first", display_name="First", summary="A test.").title == "First"


def test_load_imports_the_implementation() -> None:
    assert record("first").load()(9) == 3


def test_load_misses_the_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"tensorboard.*\[track\]"):
        record("first", package="tensorboard").load()

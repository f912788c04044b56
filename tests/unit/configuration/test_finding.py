"""Which file a path, a folder or a name of a configuration means."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.configuration.finding import choose_config, find_config
from simpletuner.helpers.errors import ConfigError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (
        "config/config.json",
        "config/mine/config.json",
        "config/examples/toy/config.json",
        "b.json",
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "mine").mkdir()  # of the same name as a configuration, and none


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ("b.json", "b.json"),
        ("b", "b.json"),
        ("config", "config/config.json"),
        ("config/mine/", "config/mine/config.json"),
        ("config/mine/config", "config/mine/config.json"),
        ("mine", "config/mine/config.json"),
        ("examples/toy", "config/examples/toy/config.json"),
        ("toy", "config/examples/toy/config.json"),
        ("config\\mine", "config/mine/config.json"),
        ("examples\\toy\\config.json", "config/examples/toy/config.json"),
    ],
)
def test_a_configuration_is_found_by_file_folder_or_name(given: str, file: str) -> None:
    assert find_config(Path(given)) == Path(file)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"mien.*Did you mean mine\?"):
        find_config(Path("mien"))


def test_an_unknown_name_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"other.*mine, toy"):
        find_config(Path("other"))


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: this folder has no config\.json"):
        find_config(Path("empty"))


@pytest.mark.parametrize(
    ("given", "arguments", "file", "overrides"),
    [
        (None, (), "config/config.json", ()),
        (None, ("seed=1",), "config/config.json", ("seed=1",)),
        (None, ("--seed", "1"), "config/config.json", ("--seed", "1")),
        (None, ("mine", "--seed", "1"), "config/mine/config.json", ("--seed", "1")),
        ("mine", ("seed=1",), "config/mine/config.json", ("seed=1",)),
    ],
)
def test_the_first_argument_names_the_configuration(
    given: str | None, arguments: tuple[str, ...], file: str, overrides: tuple[str, ...]
) -> None:
    option = None if given is None else Path(given)
    assert choose_config(option, arguments) == (Path(file), overrides)


def test_two_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"b\.json and --config mine"):
        choose_config(Path("mine"), ("b.json",))

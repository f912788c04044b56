"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from simpletuner import __version__, cli, train
from simpletuner.helpers.configuration.reference import reference
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models import registry


@pytest.fixture(autouse=True)
def _at_the_root(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["simpletuner", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    assert _run(monkeypatch, argument) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(
        command in out
        for command in (
            *("train", "validate", "sample", "inspect", "export", "merge", "resize", "extract"),
            *("config-reference", "version"),
        )
    )


def test_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "trian") == 2
    assert "'train'" in capsys.readouterr().err


def test_validate_accepts_the_shipped_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "validate") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("config/config.json: valid.")
    assert captured.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=7", "--learning_rate=1e-3", "--max_train_steps", "9"],
        ["--max_train_steps", "9", "--learning_rate", "1e-3", "--seed=7"],
        ["--config", "config/config.json", "--seed", "7", "learning_rate=1e-3", "max_train_steps=9"],
    ],
    ids=" ".join,
)
def test_values_on_the_command_line_win_in_every_way_to_write_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert _run(monkeypatch, "validate", "--resolved", *arguments) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["seed"], resolved["learning_rate"], resolved["max_train_steps"]) == (7, 1e-3, 9)


@pytest.mark.parametrize("command", ["train", "validate"])
def test_every_mistake_is_told_at_once_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert _run(monkeypatch, command, "lerning_rate=1", "--seed=x") == 2
    captured = capsys.readouterr()
    assert re.search(r"lerning_rate.*learning_rate", captured.err)
    assert re.search(r"seed.*\"x\"", captured.err)
    assert captured.err.startswith("simpletuner: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_missing_configuration_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for arguments in (["--config", "absent.json"], ["absent.json", "seed=1"]):
        assert _run(monkeypatch, command, *arguments) == 2
        assert "absent.json" in capsys.readouterr().err


def test_a_configuration_is_taken_by_its_path_folder_or_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("demo-photo", "config/examples/demo-photo", "config/examples/demo-photo/config.json"):
        assert _run(monkeypatch, "validate", "--resolved", name, "--seed", "7") == 0
        resolved = json.loads(capsys.readouterr().out)
        assert (Path(resolved["output_dir"]).name, resolved["seed"]) == ("demo-photo", 7)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["README.md"], "README.md: this is no safetensors file"),
        (["--adapter", "absent"], "absent: no such file"),
        (["documentation"], "documentation: this folder has no"),
        ([], "No adapter"),
        (["a.safetensors", "--adapter", "b.safetensors"], "Two adapters"),
    ],
)
def test_sample_names_what_is_no_adapter(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    assert _run(monkeypatch, "sample", *arguments, "--prompt", "x") in (1, 2)
    assert named in capsys.readouterr().err


def test_the_reference_is_printed_or_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = reference(registry.specs())
    assert _run(monkeypatch, "config-reference") == 0
    assert capsys.readouterr().out == page
    assert _run(monkeypatch, "config-reference", "--output", str(tmp_path / "page.md")) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page


def test_file_that_exists_is_replaced_only_with_overwrite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("mine")
    assert _run(monkeypatch, "config-reference", "--output", str(mine)) == 1
    assert "mine.md" in (message := capsys.readouterr().err)
    assert "--overwrite" in message
    assert mine.read_text() == "mine"
    assert _run(monkeypatch, "config-reference", "--output", str(mine), "--overwrite") == 0
    assert mine.read_text() != "mine"


def group_of(app: typer.Typer) -> dict[str, Any]:
    """The commands of an app by their names."""
    return dict(typer.main.get_group(app).commands)


def test_every_command_that_writes_one_file_has_overwrite() -> None:
    commands = {**group_of(cli.app), **group_of(cli.benchmark_app), **group_of(cli.examples_app)}
    options = {
        name: {option: each for each in command.params for option in each.opts}
        for name, command in commands.items()
    }
    writing = {
        name for name, each in options.items() if "--output" in each and each["--output"].metavar == "FILE"
    }
    assert writing == {"export", "merge", "resize", "extract", "config-reference"}
    assert all("--overwrite" in options[name] for name in writing)


def test_the_committed_reference_is_the_generated_one(repository: Path) -> None:
    committed = (repository / cli.REFERENCE).read_text(encoding="utf-8")
    assert committed == reference(registry.specs()), (
        f"run: simpletuner config-reference --output {cli.REFERENCE} --overwrite"
    )


@pytest.mark.parametrize(
    ("arguments", "config", "overrides"),
    [
        ([], None, ()),
        (["--config", "a.json", "seed=1"], "a.json", ("seed=1",)),
        (["seed=1", "--config=a=b.json"], "a=b.json", ("seed=1",)),
        (["--seed", "1", "--flag"], None, ("--seed", "1", "--flag")),
        (["--config_x=1"], None, ("--config_x=1",)),
    ],
)
def test_arguments_are_split_into_the_file_and_the_rest(
    arguments: list[str], config: str | None, overrides: tuple[str, ...]
) -> None:
    assert train.split_arguments(arguments) == (None if config is None else Path(config), overrides)


@pytest.mark.parametrize("arguments", [["--config"], ["--config="], ["seed=1", "--config"]])
def test_a_config_option_without_a_file_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--config needs a file"):
        train.split_arguments(arguments)

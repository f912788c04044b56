"""The examples: found where they are installed, copied to where nothing is."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from simpletuner import cli
from simpletuner.helpers.configuration import examples as module
from simpletuner.helpers.configuration.examples import copy_example, examples
from simpletuner.helpers.errors import ConfigError

NAME = "sdxl-tlora-quick"
COMMAND = re.compile(r"simpletuner (?:examples|validate)(?: [\w./-]+)+")


@pytest.fixture
def home(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like a clone's, whose config folder is empty."""
    (tmp_path / "simpletuner").symlink_to(repository / "simpletuner")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_copy_lies_in_config_under_the_examples_name(home: Path, repository: Path) -> None:
    assert copy_example(NAME) == Path("config", NAME, "config.json")
    source = repository / "config" / "examples" / NAME
    copied = {path.name: path.read_bytes() for path in (home / "config" / NAME).iterdir()}
    assert copied == {path.name: path.read_bytes() for path in source.iterdir()}
    assert len(copied) == 3


def test_a_copy_overwrites_nothing_and_names_what_is_there(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "config.json").write_text("my own")
    (home / "mine" / "lycoris_tlora.json").symlink_to("absent.json")
    with pytest.raises(ConfigError, match=r"^mine: .*config\.json, lycoris_tlora\.json"):
        copy_example(NAME, Path("mine"))
    assert (home / "mine" / "config.json").read_text() == "my own"
    assert sorted(os.listdir(home / "mine")) == ["config.json", "lycoris_tlora.json"]


def test_a_copy_beside_other_files_leaves_them(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "config.env").write_text("TRAINING_NUM_PROCESSES=2")
    copy_example(NAME, Path("mine"))
    assert len(os.listdir(home / "mine")) == 4


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(home: Path, folder: str) -> None:
    (home / "file").touch()
    with pytest.raises(ConfigError, match=f"^{folder}: cannot be written: "):
        copy_example(NAME, Path(folder))


@pytest.mark.parametrize("name", ["sdxl-tlora-quik", "../examples/sdxl-tlora-quick", "demo-photo", ""])
def test_an_unknown_name_lists_the_examples(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r}.*{', '.join(examples())}"):
        copy_example(name)
    assert not (home / "config").exists()


def test_an_installed_package_has_its_own_examples(
    home: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    packed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    ((source, place),) = packed.items()
    package = repository / "simpletuner"
    assert [str(each.relative_to(package.parent)) for each in module.PLACES] == [place, source]
    shutil.copytree(repository / source / NAME, home / "site" / NAME)
    (home / "site" / module.LIST).write_text(f"| `{NAME}` | only [one](page.md) |\n")
    monkeypatch.setattr(module, "PLACES", (home / "site", module.PLACES[1]))
    assert examples() == {NAME: "only one"}
    assert copy_example(NAME).is_file()


def test_list_prints_a_line_for_every_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("simpletuner examples list", monkeypatch) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert dict(lines) == examples()


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "Train your own"), ("documentation/quickstart.md", "")]
)
def test_the_commands_of_a_page_lead_to_a_valid_configuration(
    page: str,
    heading: str,
    *,
    home: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    if heading:
        text = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    commands = COMMAND.findall(text)
    assert [command.split()[1:3] for command in commands][:2] == [["examples", "list"], ["examples", "copy"]]
    assert commands[-1] == "simpletuner validate mine"
    for command in commands:
        assert _run(command, monkeypatch) == 0, capsys.readouterr().err
    assert "config/mine/config.json: valid." in capsys.readouterr().out
    keys = json.loads((home / "config" / "mine" / "config.json").read_text())
    assert keys["data_backend_config"] == "multidatabackend.json"

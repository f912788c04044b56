"""The written files, the page beside them, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner import cli
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.migration.report import counts
from simpletuner.helpers.configuration.migration.writing import write_migration
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.models import registry
from tests.unit.configuration.migration.foreign_files import images, kohya, migrate, toml

SCRIPT = "sdxl_train_network"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "train" / "10_sks dog", 3, caption="a dog")
    return tmp_path


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["simpletuner", "migrate", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(str(end.value.code or 0))


def test_the_command_writes_a_valid_configuration(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = toml(workspace / "prompts.txt", "a cat\na dog\n")
    options = {
        "network_module": "lycoris.kohya",
        "network_args": ["algo=loha"],
        "sample_prompts": prompts.as_posix(),
        "flip_aug": True,
        "color_aug": True,
        "max_train_epochs": 2,
    }
    command = kohya(workspace / "train", SCRIPT, options)
    assert _command(monkeypatch, command, "--to", "config/mine") == 0
    out = capsys.readouterr().out
    assert "config/mine/config.json: valid." in out
    run = load_config(Path("config/mine/config.json"), families=registry.specs())
    assert run.lycoris is not None
    assert run.lycoris.algo == "loha"
    assert not run.differing_defaults, "they are kohya's, not SimpleTuner's"
    assert [prompt.text for prompt in run.validation.prompts] == ["a cat", "a dog"]
    assert [dataset.repeats for dataset in run.datasets] == [9]
    page = Path("config/mine/MIGRATION.md").read_text()
    assert [dataset.random_flip for dataset in run.datasets] == [True]
    assert "color_aug` |" in page.partition("## Not translated")[2].partition("##")[0]
    assert "| optimiser steps | 60 | 60 |" in page
    assert "| images in all | 60 | 60 |" in page


def test_what_the_user_must_supply_is_listed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"pretrained_model_name_or_path": "models/missing.safetensors"}
    assert _command(monkeypatch, kohya(workspace / "elsewhere", SCRIPT, options), "--to", "config/mine") == 0
    out = capsys.readouterr().out
    assert "not valid yet" in out
    assert all(each in out for each in ("missing.safetensors", "elsewhere"))
    page = Path("config/mine/MIGRATION.md").read_text()
    assert "missing.safetensors" in page


def test_files_that_exist_are_kept_unless_overwritten(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = migrate(kohya(workspace / "train", SCRIPT, {}))
    (workspace / "config").mkdir()
    (workspace / "config" / "config.json").write_text("mine")
    with pytest.raises(StorageError):
        write_migration(draft, Path("config"), source="x", specs=registry.specs(), overwrite=False)
    assert Path("config/config.json").read_text() == "mine"
    assert not Path("config/MIGRATION.md").exists()
    assert write_migration(draft, Path("config"), source="x", specs=registry.specs(), overwrite=True).is_valid


def test_a_bad_file_ends_the_command_with_its_message(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toml(workspace / "half.toml", "network_dim =")
    assert _command(monkeypatch, "half.toml", "--to", "config/mine") == ConfigError.exit_code
    assert "half.toml" in capsys.readouterr().err
    assert not Path("config/mine").exists()


def test_a_long_command_line_is_not_taken_for_a_path(workspace: Path) -> None:
    words = {f"a_key_of_a_fork_{index}": "x" * 20 for index in range(60)}
    assert migrate(kohya(Path("train"), SCRIPT, words)).config["model_family"] == "sdxl"


@pytest.mark.parametrize(
    "source", ["nowhere.toml", "nothing at all", "x" * 5000], ids=["file", "words", "too long for a path"]
)
def test_a_source_that_is_not_there_is_an_error(workspace: Path, source: str) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        migrate(source)


def test_a_folder_of_simpletuners_is_translated(workspace: Path) -> None:
    folder = workspace / "config" / "old"
    folder.mkdir(parents=True)
    (folder / "data.json").write_text(
        json.dumps([{"id": "dog", "instance_data_dir": "train/10_sks dog", "repeats": 9}])
    )
    keys = {
        "--model_family": "sdxl",
        "--model_type": "lora",
        "--lora_type": "standard",
        "--data_backend_config": "config/old/data.json",
        "--max_train_steps": 10,
        "--use_ema": True,
        "--hub_token": "hf_sesame",
        "--pretrained_model_name_or_path": "a/b",
    }
    (folder / "config.json").write_text(json.dumps(keys))
    draft = migrate(folder)
    assert (draft.program, draft.config["max_train_steps"]) == ("SimpleTuner", 10)
    written = write_migration(
        draft, Path("config/new"), source="old", specs=registry.specs(), overwrite=False
    )
    assert written.is_valid, written.to_do
    assert json.loads(written.config.read_text())["defaults"] == "simpletuner"
    page = written.files[-1].read_text()
    assert "| `hub_token` | `***` |" in page
    assert "sesame" not in page
    assert counts(draft.decisions)["same"] > 0
    assert sum(counts(draft.decisions).values()) == len(draft.decisions)

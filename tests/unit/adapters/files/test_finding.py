"""Which adapter file a folder, a run or a checkpoint means."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.adapters.files.finding import find_adapter
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a run with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    for step in (9, 10):
        checkpoint = Path("output/mine") / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / ADAPTER_FILE).touch()
    return Path("output/mine")


def test_a_finished_run_is_its_adapter(run: Path) -> None:
    (run / ADAPTER_FILE).touch()
    assert find_adapter(run) == find_adapter(Path("mine")) == find_adapter(run / ADAPTER_FILE)
    assert find_adapter(run) == run / ADAPTER_FILE


def test_an_unfinished_run_is_its_newest_checkpoint(run: Path) -> None:
    assert find_adapter(run) == run / "checkpoint-10" / ADAPTER_FILE
    assert find_adapter(run / "checkpoint-9") == run / "checkpoint-9" / ADAPTER_FILE


def test_a_folder_of_one_other_file_is_that_file_and_of_several_names_them(run: Path) -> None:
    folder = run / "logs"
    folder.mkdir()
    (folder / "a.safetensors").touch()
    assert find_adapter(folder) == folder / "a.safetensors"
    (folder / "b.safetensors").touch()
    with pytest.raises(AdapterError, match=r"a\.safetensors, b\.safetensors"):
        find_adapter(folder)


@pytest.mark.parametrize("name", ["output/full", "output/full/unet"])
def test_a_whole_model_is_refused_as_one(run: Path, name: str) -> None:
    model = run.parent / "full" / "unet"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    (model / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(AdapterError, match="whole model"):
        find_adapter(Path(name))


@pytest.mark.parametrize("name", ["config", "nothing", "nothing.safetensors"])
def test_what_holds_no_adapter_is_refused(run: Path, name: str) -> None:
    Path("config").mkdir()
    with pytest.raises(AdapterError, match=name):
        find_adapter(Path(name))


def test_an_adapter_is_found_by_a_path_with_backslashes(run: Path) -> None:
    assert find_adapter(Path("output\\mine\\checkpoint-9")) == run / "checkpoint-9" / ADAPTER_FILE

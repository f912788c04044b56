"""The last files of a run: written by the main process, gathered with the help of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, EMA_ADAPTER_FILE, SUMMARY_FILE
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.reporting.run_summary import load_summary
from simpletuner.helpers.training.final_files import FinalFiles, restore_damaged


@dataclass
class Trainable:
    """What was trained: an adapter."""

    file_names: tuple[str, str] = (ADAPTER_FILE, EMA_ADAPTER_FILE)
    is_model: bool = False


@dataclass
class State:
    """A run's state whose adapter file says its step."""

    progress: Progress = field(default_factory=lambda: Progress(step=6))
    is_sharded: bool = False
    saved_to: list[Path] = field(default_factory=list)
    trainable: Trainable = field(default_factory=Trainable)
    metadata: dict[str, str] = field(default_factory=dict)

    ema: Ema | None = None

    def save_weights(self, folder: Path) -> list[Path]:
        names = [ADAPTER_FILE] if self.ema is None else [ADAPTER_FILE, EMA_ADAPTER_FILE]
        files = [folder / name for name in names]
        self.saved_to += files
        for file in files:
            save_file({"lycoris_a.lora_up.weight": torch.full((1, 1), self.progress.step)}, file)
        return files


@dataclass
class Ema:
    """An average that stands in either file."""

    is_main: bool = False


def make(folder: Path, state: State, *, is_main_process: bool) -> FinalFiles:
    return FinalFiles(output_dir=folder, state=state, is_main_process=is_main_process, spec=specs()["sdxl"])


def test_main_process_writes_the_adapter_and_then_the_summary_of_its_files(tmp_path: Path) -> None:
    files = make(tmp_path, State(), is_main_process=True)
    files.save_weights()
    assert float(load_file(tmp_path / ADAPTER_FILE)["lycoris_a.lora_up.weight"]) == 6
    assert not (tmp_path / SUMMARY_FILE).exists()
    files.save_summary(grid=tmp_path / "missing.png", page=tmp_path / "report.html")
    summary = load_summary(tmp_path)
    assert summary is not None
    assert (summary.step, summary.adapter) == (6, str(tmp_path / ADAPTER_FILE))
    assert summary.checkpoint == str(tmp_path / "checkpoint-6")
    assert summary.page == str(tmp_path / "report.html")
    assert summary.grid is summary.comfyui is None
    assert summary.comfyui_advice == "reads this file"


def test_the_folders_of_trackers_are_in_the_final_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tensorboard", "wandb"):
        (tmp_path / name).mkdir()
    files = make(tmp_path, State(), is_main_process=True)
    files.save_weights()
    with caplog.at_level("INFO"):
        files.save_summary(grid=tmp_path / "grid.png", page=None)
    assert f"Tensorboard: {tmp_path / 'tensorboard'}" in " ".join(caplog.text.split())
    assert f"Wandb: {tmp_path / 'wandb'}" in " ".join(caplog.text.split())


@pytest.mark.parametrize("is_sharded", [False, True])
def test_other_processes_help_to_gather_a_sharded_adapter_and_write_nothing(
    tmp_path: Path, is_sharded: bool
) -> None:
    state = State(is_sharded=is_sharded)
    files = make(tmp_path, state, is_main_process=False)
    files.save_weights()
    files.save_summary(grid=tmp_path / "grid.png", page=None)
    assert len(state.saved_to) == is_sharded
    assert not any(file.exists() for file in state.saved_to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["none", "changed", "removed"])
def test_only_a_damaged_adapter_is_written_again_and_is_then_the_sealed_one(
    tmp_path: Path, damage: str
) -> None:
    files = make(tmp_path, State(), is_main_process=True)
    files.save_weights()
    files.save_summary(grid=tmp_path / "grid.png", page=None)
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / ADAPTER_FILE).write_bytes(b"of the checkpoint")
    adapter = tmp_path / ADAPTER_FILE
    sound = adapter.read_bytes()
    if damage == "changed":
        adapter.write_bytes(sound[:-1])
    elif damage == "removed":
        adapter.unlink()
    for _ in range(2):
        summary = load_summary(tmp_path)
        assert summary is not None
        restore_damaged(summary, tmp_path, checkpoint=tmp_path / "checkpoint-6", spec=SPEC)
        assert adapter.read_bytes() == (sound if damage == "none" else b"of the checkpoint")
        (tmp_path / "checkpoint-6" / ADAPTER_FILE).write_bytes(b"of another time")


@pytest.mark.parametrize("is_main", [False, True], ids=["plain", "main"])
def test_summary_of_a_run_with_an_average_names_and_seals_both_files(tmp_path: Path, is_main: bool) -> None:
    files = make(tmp_path, State(ema=Ema(is_main=is_main)), is_main_process=True)
    files.save_weights()
    files.save_summary(grid=tmp_path / "grid.png", page=None)
    summary = load_summary(tmp_path)
    assert summary is not None
    second = str(tmp_path / EMA_ADAPTER_FILE)
    assert (summary.ema, summary.plain) == ((None, second) if is_main else (second, None))
    assert summary.files.keys() == {ADAPTER_FILE, EMA_ADAPTER_FILE}
    checkpoint = tmp_path / "checkpoint-6"
    checkpoint.mkdir()
    for name in summary.files:
        (checkpoint / name).write_bytes(name.encode())
    (tmp_path / EMA_ADAPTER_FILE).unlink()
    restore_damaged(summary, tmp_path, checkpoint=checkpoint, spec=SPEC)
    assert {name: (tmp_path / name).read_bytes() for name in summary.files} == {
        name: name.encode() for name in summary.files
    }

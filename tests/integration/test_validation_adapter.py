"""Another run's adapter in a run's pictures: trained first where it is missing, shown, gone without trace."""

from __future__ import annotations

import functools
import json
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner import train as command
from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.errors import AdapterError, CheckpointError, TrainingError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.run_summary import RunSummary
from simpletuner.helpers.sampling import attached, comparison
from simpletuner.helpers.sampling.sample_command import SampleRequest, sample
from simpletuner.helpers.training import runs, validation
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.processes import start_ranks
from tests.integration.test_preemption import signal_at
from tests.integration.test_validation import PICTURES, pixels
from tests.integration.tiny_runs import TLORA, TinyRun, reset_accelerate, tiny_model

pytestmark = pytest.mark.usefixtures("shared_caches")

LORA: dict[str, object] = TLORA | {"algo": "lora", "linear_dim": 4, "linear_alpha": 4}
del LORA["tlora_min_rank"]
SHORT = {"max_train_steps": 2, "checkpoint_step_interval": 0, "validation_step_interval": 0}
# Two steps that change a picture, of another run in every way that the process could remember.
OTHER = {
    "learning_rate": 0.05,
    "lr_warmup_steps": 0,
    "seed": 1,
    "mixed_precision": "bf16",
    "gradient_accumulation_steps": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "T-LoRA": {"lycoris": TLORA},
    "LoKr": {"lycoris": LORA | {"algo": "lokr"}},
    "LoRA": {"lora_type": "standard", "lora_rank": 4},
}
OWN = {"T-LoRA": {}, "LoRA": {"lora_type": "standard"}}


def other_run(folder: Path, *, lycoris: dict[str, object] = LORA, **keys: object) -> TinyRun:
    """A run that is not started, its files written."""
    run = TinyRun(folder, lycoris=lycoris, keys={**SHORT, **OTHER, **keys})
    run.config()
    return run


def run_beside(other: TinyRun, folder: Path, **keys: object) -> TinyRun:
    """A run that shows another run's adapter."""
    named = {"validation_compared_config": str(other.folder / "config.json")}
    return TinyRun(folder, keys={**PICTURES, **SHORT, **named, **keys})


@pytest.fixture
def other(tmp_path: Path) -> TinyRun:
    return other_run(tmp_path / "other")


@pytest.fixture
def run(other: TinyRun, tmp_path: Path) -> TinyRun:
    return run_beside(other, tmp_path / "run")


def train(run: TinyRun, **keys: object) -> int:
    reset_accelerate()
    return runs.train(run.config(**keys))


def steps(run: TinyRun) -> int:
    return len(run.log()) if (run.output_dir / "metrics.jsonl").exists() else 0


def base_files(run: TinyRun) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (run.output_dir / "validation" / "base").glob("*.png")}


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The state of each run at its end."""
    found: list[str] = []
    then = Trainer.run

    def note(trainer: Trainer) -> int:
        code = then(trainer)
        found.append(trainer.state_digest())
        return code

    monkeypatch.setattr(Trainer, "run", note)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_other_run_is_trained_first_shown_as_its_own_file_shows_it_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: list[str], kind: str
) -> None:
    expected_run, expected = alone("T-LoRA")
    digests.clear()
    other = other_run(tmp_path / "other", **KINDS[kind])
    run = run_beside(other, tmp_path / "run")
    titles: list[str] = []
    shown: list[np.ndarray] = []

    def note(rows: Any, *, columns: list[str]) -> Image.Image:
        titles.extend(columns)
        shown.extend(np.asarray(picture).astype(int) for picture in rows[0].images)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(validation, "labelled_grid", note)
    assert train(run) == 0
    assert (steps(other), steps(run)) == (2, 2)
    assert titles == ["base model", "T-LoRA of output" if kind == "T-LoRA" else kind, "T-LoRA, step 2"]
    base, compared, own = shown
    assert np.abs(compared - base).max() > 2
    assert np.abs(compared - own).max() > 2
    # A file holds sums, whose rounding may move a pixel by one of 255.
    assert np.abs(compared - sampled(other, tmp_path / "samples")).max() <= 1
    assert digests[1] == expected != digests[0]
    assert run.log() == expected_run.log()


def sampled(run: TinyRun, folder: Path) -> np.ndarray:
    """The picture of PICTURES by a finished run's adapter, made by `simpletuner sample`."""
    request = SampleRequest(
        adapter=run.output_dir / ADAPTER_FILE,
        prompts=[str(PICTURES["validation_prompt"])],
        model={"pretrained_model_name_or_path": str(tiny_model())},
        validation={
            "validation_resolution": "64",
            "validation_num_inference_steps": 2,
            "validation_guidance": 3.0,
            "validation_seed": 7,
        },
        dtype="fp32",
        options={},
    )
    (file,) = sample(request, output=folder, families=registry.specs())
    return pixels(file)


@functools.cache
def alone(own: str) -> tuple[TinyRun, str]:
    """A run that is compared with nothing, trained once per process, and the digest of its end."""
    run = TinyRun(Path(tempfile.mkdtemp(prefix="alone_")), keys={**PICTURES, **SHORT, **OWN[own]})
    with run.trainer() as trainer:
        assert trainer.run() == 0
        return run, trainer.state_digest()


def test_training_of_a_lora_beside_another_is_bit_identical_to_a_run_that_is_compared_with_nothing(
    tmp_path: Path, digests: list[str]
) -> None:
    expected_run, expected = alone("LoRA")
    digests.clear()
    run = run_beside(other_run(tmp_path / "other", **KINDS["LoRA"]), tmp_path / "run", **OWN["LoRA"])
    assert train(run) == 0
    assert digests[1] == expected != digests[0]
    assert run.log() == expected_run.log()


def test_adapter_that_stays_in_the_model_ends_the_run(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "remove_from_pipeline", lambda *_: None)
    with pytest.raises(TrainingError, match=ADAPTER_FILE):
        train(run)
    assert steps(run) == 0


def test_pictures_of_the_other_adapter_are_made_once_until_it_changes(
    run: TinyRun, other: TinyRun, tmp_path: Path
) -> None:
    assert train(run, validation_step_interval=1) == 0
    made = base_files(run)
    assert len(made) == 2
    assert train(run, max_train_steps=3) == 0
    assert base_files(run) == made
    other.config(max_train_steps=3)
    assert train(run, max_train_steps=4) == 0
    assert steps(other) == 3
    now = base_files(run)
    assert len(now) == 3
    assert made.items() < now.items()


def test_strength_of_a_prompt_is_the_other_adapters_too(run: TinyRun) -> None:
    library = run.folder / "prompts.json"
    prompts = {
        name: {"prompt": "a dog", "adapter_strength": value} for name, value in (("no", 0), ("yes", 2))
    }
    library.write_text(json.dumps(prompts))
    assert train(run, validation_prompt=None, user_prompt_library=str(library)) == 0
    differences = {}
    for name in prompts:
        first, second = (pixels(file) for file in base_files(run) if f"-{name}-" in file.name)
        differences[name] = np.abs(first - second).max()
    assert differences["no"] == 0
    assert differences["yes"] > 2


def test_adapter_that_cannot_be_shown_leaves_its_column_empty_and_the_run_goes_on(
    run: TinyRun, other: TinyRun, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(other) == 0
    other_adapter = other.output_dir / ADAPTER_FILE

    def refused(*_: object, **__: object) -> None:
        raise AdapterError(f"{other_adapter}: torn")

    monkeypatch.setattr(comparison, "attached", refused)
    assert train(run) == 0
    assert f"{other_adapter}: torn" in caplog.text
    assert (run.output_dir / "validation" / "step-2" / "grid.png").is_file()


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_adapter_of_a_finished_run_is_written_again_from_its_checkpoint(
    run: TinyRun, other: TinyRun, damage: str
) -> None:
    assert train(other) == 0
    file = other.output_dir / ADAPTER_FILE
    before = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(b"torn")
    assert train(run) == 0
    assert file.read_bytes() == before


def test_run_that_a_third_waits_for_is_trained_before_it(tmp_path: Path, run: TinyRun) -> None:
    run.config()
    assert train(run_beside(run, tmp_path / "third")) == 0
    adapters = [tmp_path / name / "output" / ADAPTER_FILE for name in ("other", "run", "third")]
    made = [file.stat().st_mtime_ns for file in adapters]
    assert made == sorted(made)


def test_mistake_of_the_run_itself_is_told_before_the_other_is_trained(run: TinyRun, other: TinyRun) -> None:
    assert TinyRun(run.folder, keys=SHORT).run() == 0
    run.lycoris = TLORA | {"linear_dim": 4}
    with pytest.raises(CheckpointError, match="linear_dim"):
        train(run, max_train_steps=3)
    assert steps(other) == 0


@pytest.mark.parametrize("reason", ["no pictures", "finished"])
def test_other_run_is_not_trained_for_pictures_that_are_not_made(
    run: TinyRun, other: TinyRun, reason: str
) -> None:
    if reason == "finished":
        assert TinyRun(run.folder, keys=SHORT).run() == 0
    assert train(run, validation_disable=reason == "no pictures") == 0
    assert (steps(other), steps(run)) == (0, 2)


def run_command(run: TinyRun) -> int:
    reset_accelerate()
    run.config()
    return command.main(["--config", str(run.folder / "config.json")])


@pytest.mark.reliability_row(3)
def test_signal_while_the_other_run_trains_saves_it_and_the_same_command_goes_on(
    run: TinyRun, other: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stopped = signal_at(1, number=signal.SIGTERM, then=Trainer.train_step)
        patched.setattr(Trainer, "train_step", stopped)
        assert run_command(run) == EXIT_PREEMPTED
    assert (other.output_dir / "checkpoint-1").is_dir()
    assert json.loads((run.output_dir / "exit.json").read_text())["exit_code"] == EXIT_PREEMPTED
    assert steps(run) == 0
    assert run_command(run) == 0
    assert (steps(other), steps(run)) == (2, 2)


@pytest.mark.reliability_row(3)
def test_signal_in_the_other_runs_last_moment_leaves_this_one_for_the_next_start(
    run: TinyRun, other: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(RunSummary, "save", signal_at(1, number=signal.SIGTERM, then=RunSummary.save))
        assert run_command(run) == EXIT_PREEMPTED
    assert (steps(other), steps(run)) == (2, 0)
    assert run_command(run) == 0


@pytest.mark.reliability_row(3)
def test_signal_while_the_pictures_are_made_ends_before_the_first_step(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = comparison.attached
    with monkeypatch.context() as patched:
        patched.setattr(comparison, "attached", signal_at(1, number=signal.SIGTERM, then=attach))
        assert run_command(run) == EXIT_PREEMPTED
    assert steps(run) == 0
    assert run_command(run) == 0
    assert len(base_files(run)) == 2


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting import run_summary
from simpletuner.helpers.training import runs
save = run_summary.RunSummary.save
def stopped(self, output_dir):
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGTERM)
    save(self, output_dir)
run_summary.RunSummary.save = stopped
sys.exit(runs.train(load_config(Path(sys.argv[1]), families=registry.specs())))
"""


def test_two_processes_train_both_runs_and_agree_on_a_signal_between_them(
    other: TinyRun, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    run = replace(run_beside(other, tmp_path / "run"), num_images=4)
    alone = TinyRun(tmp_path / "alone", num_images=4, keys={**PICTURES, **SHORT, "train_batch_size": 2})

    def codes(*arguments: str) -> list[int]:
        run.config()
        pair = start_ranks(tmp_path / "script.py", run.folder / "config.json", *arguments)
        return [each.wait() for each in pair]

    assert codes("stop") == [EXIT_PREEMPTED] * 2
    assert (steps(other), steps(run)) == (2, 0)
    (other.output_dir / "finished.json").unlink()  # so that one start has both runs to do
    assert codes() == [0, 0]
    assert train(alone) == 0
    losses = [[line["loss"] for line in each.log()] for each in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(base_files(run)) == 2

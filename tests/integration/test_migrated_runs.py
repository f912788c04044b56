"""Configurations of other programs: translated, written, checked, and trained on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.migration.writing import write_migration
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
from tests.integration.tiny_runs import reset_accelerate, tiny_model
from tests.unit.configuration.migration.foreign_files import (
    ai_toolkit,
    arguments,
    images,
    kohya,
    migrate,
    one_trainer,
)


def _folders(folder: Path) -> Path:
    images(folder / "2_sks dog", 3, caption="a photo of a dog")
    images(folder / "1_sks cat", 3)
    return folder


def _kohya(folder: Path) -> str:
    options = {
        "pretrained_model_name_or_path": tiny_model().as_posix(),
        "max_train_epochs": 1,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "enable_bucket": True,
        "network_dim": 4,
        "network_args": ["conv_dim=2"],
        "learning_rate": 1e-3,
    }
    return kohya(_folders(folder / "train"), "sdxl_train_network", options)


def _ai_toolkit(folder: Path) -> Path:
    train = images(folder / "train", 4, caption="a dog\nin two lines")
    return ai_toolkit(
        folder / "job.yaml",
        [{"folder_path": train.as_posix(), "resolution": [64, 96], "num_repeats": 2}],
        model={"name_or_path": tiny_model().as_posix(), "arch": "sdxl"},
        train={"steps": 4, "batch_size": 2, "gradient_accumulation_steps": 2, "dtype": "fp32", "lr": 1e-3},
    )


def _one_trainer(folder: Path) -> Path:
    train = images(folder / "train", 5, caption="a dog")
    return one_trainer(
        folder / "run.json",
        [{"path": train.as_posix(), "balancing": 2.0}],
        base_model_name=tiny_model().as_posix(),
        layer_filter_preset="attn-only",
        batch_size=4,
        epochs=1,
        train_dtype="FLOAT_32",
        learning_rate_warmup_steps=0,
    )


def _diffusers(folder: Path) -> str:
    options = {
        "pretrained_model_name_or_path": tiny_model().as_posix(),
        "instance_data_dir": images(folder / "train", 3).as_posix(),
        "instance_prompt": "a photo of sks dog",
        "resolution": 64,
        "train_batch_size": 2,
        "repeats": 2,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
    }
    return f"accelerate launch train_dreambooth_lora_sdxl.py {arguments(options)}"


def _lokr(folder: Path) -> str:
    options = {
        "pretrained_model_name_or_path": tiny_model().as_posix(),
        "network_module": "lycoris.kohya",
        "network_args": ["algo=lokr", "preset=attn-mlp", "factor=2"],
        "max_train_steps": 2,
        "learning_rate": 1e-3,
    }
    return kohya(_folders(folder / "train"), "sdxl_train_network", options)


# Source of the run -> (steps, images in all) of the other program, by hand:
# kohya: 3 images twice and 3 once share a bucket: 9 draws, 5 batches of 2, 3 steps of 2 batches.
# ai-toolkit: 4 batches of 2, two to a step. OneTrainer: 10 draws, 2 whole batches of 4.
# diffusers: 3 images twice, 3 batches of 2, 2 steps. lokr: 2 steps of one image.
RUNS: dict[str, tuple[Callable[[Path], str | Path], tuple[int, int]]] = {
    "kohya": (_kohya, (3, 9)),
    "ai-toolkit": (_ai_toolkit, (2, 8)),
    "onetrainer": (_one_trainer, (2, 8)),
    "diffusers": (_diffusers, (2, 6)),
    "kohya lokr": (_lokr, (2, 2)),
}


@pytest.mark.parametrize(("source", "expected"), RUNS.values(), ids=RUNS)
def test_a_translated_run_trains_for_as_many_steps_as_its_own_program(
    source: Callable[[Path], str | Path],
    expected: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draft = migrate(source(tmp_path))
    assert draft.length is not None
    assert (draft.length.steps, draft.length.samples) == expected
    folder = tmp_path / "config" / "mine"
    written = write_migration(draft, folder, source="x", specs=registry.specs(), overwrite=False)
    assert written.is_valid, written.to_do
    run = load_config(written.config, families=registry.specs())
    settings = run.training
    assert settings.max_train_steps == expected[0]
    per_step = settings.train_batch_size * settings.gradient_accumulation_steps
    # Here the last batch of a bucket and of an epoch is filled up.
    assert expected[1] <= expected[0] * per_step < expected[1] + per_step
    reset_accelerate()
    assert build_trainer(run).run() == 0
    steps = (run.checkpoint.output_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[-1])["step"] == expected[0]

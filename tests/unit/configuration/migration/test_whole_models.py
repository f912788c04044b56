"""Files of other programs that train the whole denoiser become model_type full, and can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.models.registry import specs
from tests.unit.configuration.migration.foreign_files import (
    ai_toolkit,
    arguments,
    decision,
    images,
    kohya,
    migrate,
    one_trainer,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images(tmp_path / "dog", 3, caption="a dog")


def load(draft: Draft, tmp_path: Path) -> dict[str, JsonValue]:
    """The resolved configuration: what was written is valid here."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(draft.config | {"data_backend_config": draft.datasets}))
    run = load_config(file, families=specs())
    assert run.model.is_full
    assert not any("lora" in key or "lycoris" in key for key in draft.config)
    return run.resolved()


KOHYA: dict[str, object] = {"mixed_precision": "bf16", "optimizer_type": "adafactor", "full_bf16": True}


@pytest.mark.parametrize("script", ["sdxl_train", "flux_train"])
def test_kohyas_scripts(folder: Path, tmp_path: Path, script: str) -> None:
    given = KOHYA | {"fused_backward_pass": True, "blocks_to_swap": 8, "learning_rate": 1e-5}
    draft = migrate(kohya(folder, script, given))
    run = load(draft, tmp_path)
    assert (run["fused_backward_pass"], run["max_grad_norm"], run["learning_rate"]) == (True, 0, 1e-5)
    assert (run["mixed_precision"], run["enable_group_offload"]) == ("bf16", False)
    assert decision(draft, "blocks_to_swap").outcome == "no effect"
    assert decision(draft, "max_grad_norm").outcome == "approximate"


def test_kohyas_fused_backward_pass_is_left_out_with_accumulation(folder: Path, tmp_path: Path) -> None:
    given = KOHYA | {"fused_backward_pass": True, "gradient_accumulation_steps": 2}
    run = load(migrate(kohya(folder, "sdxl_train", given)), tmp_path)
    assert (run["fused_backward_pass"], run["max_grad_norm"]) == (False, 1)


def test_fp16_of_a_whole_model_becomes_bf16(folder: Path, tmp_path: Path) -> None:
    draft = migrate(kohya(folder, "sdxl_train", {"mixed_precision": "fp16"}))
    assert load(draft, tmp_path)["mixed_precision"] == "bf16"
    assert decision(draft, "mixed_precision").outcome == "approximate"


def test_onetrainers_fine_tuning_keeps_its_layers(folder: Path, tmp_path: Path) -> None:
    optimizer = {"optimizer": "ADAFACTOR", "fused_back_pass": True, "stochastic_rounding": True}
    file = one_trainer(
        tmp_path / "run.json",
        [{"path": folder.as_posix()}],
        training_method="FINE_TUNE",
        layer_filter="attn,ff.net",
        train_dtype="BFLOAT_16",
        optimizer=optimizer,
    )
    draft = migrate(file)
    run = load(draft, tmp_path)
    assert run["layer_filter"] == ["attn", r"ff\.net"]
    assert run["fused_backward_pass"] is True
    assert decision(draft, "optimizer.stochastic_rounding").outcome == "approximate"


def test_ai_toolkits_job_without_a_network(folder: Path, tmp_path: Path) -> None:
    file = ai_toolkit(tmp_path / "job.yaml", [{"folder_path": folder.as_posix()}])
    job = json.loads(file.read_text())
    del job["config"]["process"][0]["network"]
    file.write_text(json.dumps(job))
    assert load(migrate(file), tmp_path)["model_type"] == "full"


@pytest.mark.parametrize("script", ["train_text_to_image_sdxl", "train_dreambooth_flux"])
def test_scripts_of_diffusers(folder: Path, tmp_path: Path, script: str) -> None:
    given = {
        "pretrained_model_name_or_path": "a/b",
        "instance_data_dir": folder.as_posix(),
        "mixed_precision": "bf16",
        "learning_rate": 1e-6,
    }
    draft = migrate(f"accelerate launch {script}.py {arguments(given)}")
    assert load(draft, tmp_path)["learning_rate"] == 1e-6

"""What a run does alike in every family: cache, train, validate, checkpoint, resume, sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from tests.integration.attached import command
from tests.integration.family_runs import DEV, FLUX, IMAGES, KLEIN, MODELS, FamilyModel, image_in
from tests.integration.tiny_runs import gradients

pytestmark = pytest.mark.usefixtures("shared_caches")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_run_ends_with_everything_it_promises(
    tmp_path: Path, model: FamilyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model.run(tmp_path)
    keys = {"learning_rate": 0.05, "lr_scheduler": "constant", "train_batch_size": 2}
    assert run.run(**keys, **IMAGES) == 0
    for name in (ADAPTER_FILE, f"checkpoint-4/{ADAPTER_FILE}", "validation/step-2/grid.png"):
        assert (run.output_dir / name).is_file(), name
    file = run.output_dir / ADAPTER_FILE
    assert len({key.split(".")[0] for key in load_file(file)}) == model.num_layers
    assert [line["step"] for line in run.log()] == [1, 2, 3, 4]
    assert all(2 <= line["mean_active_rank"] <= 8 for line in run.log())
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["model_family"] == model.family
    assert json.loads(metadata["tlora_config"])["max_rank"] == 8
    base, trained = (image_in(run.output_dir / "validation" / each) for each in ("base", "step-4"))
    assert np.abs(base - trained).max() > 2
    # What the last validation showed is what the finished file gives to whoever samples from it.
    arguments = ("--prompt", IMAGES["validation_prompt"], "--size", "64x80", "--steps", 3, "--seed", 5)
    output = tmp_path / "sampled"
    assert command(monkeypatch, "sample", "--adapter", file, *arguments, "--output", output) == 0
    assert np.abs(image_in(output) - trained).max() <= 1


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        pytest.param(FLUX, {"flux_guidance_mode": "random-range", "flow_use_beta_schedule": True}, id="flux"),
        pytest.param(KLEIN, {"train_batch_size": 2}, id="flux2-klein"),
    ],
)
@pytest.mark.reliability_row(4)
def test_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    tmp_path: Path, model: FamilyModel, keys: dict[str, object]
) -> None:
    whole, interrupted = model.run(tmp_path / "whole"), model.run(tmp_path / "interrupted")
    assert whole.run(max_train_steps=3, lr_scheduler="constant", **keys) == 0
    for steps in (1, 3):
        assert interrupted.run(max_train_steps=steps, lr_scheduler="constant", **keys) == 0
    ours, theirs = (load_file(run.output_dir / ADAPTER_FILE) for run in (interrupted, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert interrupted.log() == whole.log()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("model", [FLUX, DEV], ids=["flux", "flux2-dev"])
@pytest.mark.reliability_row(10)
def test_gradients_with_checkpointing_equal_those_without(
    tmp_path: Path, model: FamilyModel, batch_size: int
) -> None:
    found = []
    for checkpointing in (False, True):
        run = model.run(tmp_path / str(checkpointing))
        with run.trainer(gradient_checkpointing=checkpointing, train_batch_size=batch_size) as trainer:
            batch = next(iter(trainer.data.batches(start=0)))
            trainer.train_step(batch.to(trainer.accelerator.device))
            found.append(gradients(trainer))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert any(gradient.abs().max() > 0 for gradient in found[0])

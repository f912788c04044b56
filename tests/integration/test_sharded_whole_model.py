"""A whole model sharded over two processes by FSDP 2, resumed on one process, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.helpers.io.run_folder import checkpoint_folder
from tests.integration.test_several_processes import ON_CPU_TOO, tensors, train
from tests.integration.tiny_runs import TinyRun

KEYS: dict[str, object] = {
    "model_type": "full",
    "lora_type": "standard",
    "lycoris_config": None,
    "lr_scheduler": "constant",
    "learning_rate": 1e-3,
    # A large eps: where a gradient is nearly zero, Adam divides rounding by rounding.
    "optimizer_config": "eps=1e-3",
    "use_ema": True,
    "gradient_checkpointing": True,
}
WITH_WRITES = """
import os, sys
from pathlib import Path
import simpletuner.helpers.models.whole_model as whole_model
write = whole_model.write_model
def write_model(path, config, state, **others):
    with open(Path(sys.argv[1]).parent / f"writes-{os.environ['RANK']}", "a") as file:
        file.write(f"{path.name} {len(state)}\\n")
    write(path, config, state, **others)
whole_model.write_model = write_model
"""
PHASES = {"no": ((2, 2), (1, 4)), "bf16": ((1, 2), (2, 4))}
"""mixed_precision -> number of processes and the last step on them, and the same after a stop."""


def model_in(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module", params=PHASES)
def moved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Four steps of two samples each: two on some processes, two on another number of them."""
    run = TinyRun(tmp_path_factory.mktemp("moved") / request.param, num_images=4)
    run.keys |= {"mixed_precision": request.param}
    for num_processes, steps in PHASES[request.param]:
        train(
            run,
            num_processes=num_processes,
            before=ON_CPU_TOO + WITH_WRITES if num_processes == 2 else "",
            train_batch_size=2 // num_processes,
            max_train_steps=steps,
            **KEYS,
        )
        for rank in range(num_processes):
            parts = json.loads((run.folder / f"parts-{rank}.json").read_text())
            assert parts[0] == (parts[1] if num_processes == 2 else 0), "every weight is shared, or none"
    return run


def test_another_number_of_processes_goes_on_from_the_very_weights(moved: TinyRun) -> None:
    stored = model_in(checkpoint_folder(moved.output_dir, 2) / "unet")
    (_, _), (num_processes, _) = PHASES[str(moved.keys["mixed_precision"])]
    for rank in range(num_processes):
        loaded, trained = (tensors(moved, f"{name}-{rank}") for name in ("start", "end"))
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in loaded.items())
        assert any(not torch.equal(tensor, trained[key]) for key, tensor in loaded.items())


def test_only_the_first_process_gathers_and_writes_the_model(moved: TinyRun) -> None:
    num_weights = len(model_in(moved.output_dir / "unet"))
    written = (moved.folder / "writes-0").read_text().splitlines()
    assert f"unet {num_weights}" in written
    assert not (moved.folder / "writes-1").exists()


def test_model_of_a_sharded_run_is_one_of_diffusers(moved: TinyRun) -> None:
    for name in ("unet", "unet_ema"):
        folder = moved.output_dir / name
        assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
        model = UNet2DConditionModel.from_pretrained(folder, torch_dtype="auto")
        assert model.state_dict().keys() == model_in(folder).keys()


@pytest.mark.parametrize("moved", ["no"], indirect=True)
def test_moved_run_trains_what_one_process_trains(moved: TinyRun, tmp_path: Path) -> None:
    one = TinyRun(tmp_path / "one", num_images=4)
    one.keys |= {"mixed_precision": "no"}
    train(one, num_processes=1, train_batch_size=2, max_train_steps=4, **KEYS)
    for name in ("unet", "unet_ema"):
        expected, found = (model_in(run.output_dir / name) for run in (one, moved))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    norms = [[line["grad_norm"] for line in run.log()] for run in (one, moved)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)

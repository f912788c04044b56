"""Training on several processes: the same adapter on each, and the one that a single process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TinyRun
from torch import Tensor

SCRIPT = """
import json, os, sys
from pathlib import Path
from safetensors.torch import save_file
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
config = load_config(Path(sys.argv[1]), families=registry.facts())
trainer = build_trainer(config)
folder = Path(sys.argv[1]).parent
rank = trainer.accelerator.process_index
save_file({k: v.clone() for k, v in trainer.adapter.state_dict().items()}, folder / f"start-{rank}.safetensors")
seen, add_noise = [], trainer.family.add_noise
def watched(latents, **options):
    noised = add_noise(latents, **options)
    seen.append(noised.timesteps)
    return noised
trainer.family.add_noise = watched
code = trainer.run()
save_file({k: v.clone() for k, v in trainer.adapter.state_dict().items()}, folder / f"end-{rank}.safetensors")
(folder / f"timesteps-{rank}.json").write_text(json.dumps(seen))
sys.exit(code)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone")
VARIANTS = {
    "plain": {"gradient_checkpointing": False},
    "checkpointed and accumulated": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}


def train(run: TinyRun, *launcher: str, **keys: object) -> TinyRun:
    run.config(**keys)
    script = run.folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(run.folder / "config.json")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


@pytest.fixture(scope="module", params=VARIANTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, TinyRun]:
    """The same three steps of two samples each: on two processes, and on one."""
    folder = tmp_path_factory.mktemp("runs")
    # A large eps: where a gradient is nearly zero, Adam divides rounding by rounding.
    constant = {"lr_scheduler": "constant", "optimizer_config": "eps=1e-3"}
    keys = {"max_train_steps": 3, **constant, **VARIANTS[request.param]}
    two = train(TinyRun(folder / "two", num_images=4), *TORCHRUN, train_batch_size=1, **keys)
    one = train(TinyRun(folder / "one", num_images=4), train_batch_size=2, **keys)
    return two, one


def tensors(run: TinyRun, name: str) -> dict[str, Tensor]:
    return load_file(run.folder / f"{name}.safetensors")


def test_both_processes_start_and_end_with_the_same_adapter(runs: tuple[TinyRun, TinyRun]) -> None:
    two, _ = runs
    for name in ("start", "end"):
        first, second = tensors(two, f"{name}-0"), tensors(two, f"{name}-1")
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_two_processes_train_what_one_trains_with_the_same_samples(runs: tuple[TinyRun, TinyRun]) -> None:
    two, one = runs
    start, end, expected = tensors(one, "start-0"), tensors(two, "end-0"), tensors(one, "end-0")
    trained = [key for key in start if not torch.equal(start[key], expected[key])]
    assert len(trained) == 3 * 64, "dQ, dP and dlam of every layer"
    assert max(float((expected[key] - start[key]).abs().max()) for key in trained) > 1e-3
    for key, tensor in expected.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-7)
    losses = [[line["loss"] for line in run.log()] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_each_process_opens_the_ranks_of_its_own_samples(runs: tuple[TinyRun, TinyRun]) -> None:
    two, one = runs
    first, second, both = (
        json.loads((run.folder / f"timesteps-{rank}.json").read_text()) for run, rank in ((two, 0), (two, 1), (one, 0))
    )
    assert [left + right for left, right in zip(first, second, strict=True)] == both
    assert first != second

"""The embedded demo, as a user runs it: config/config.json from the repository's root."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.models.sdxl.pipeline import StableDiffusionXLPipeline


def run_demo(repository: Path, output: Path) -> subprocess.CompletedProcess[str]:
    overrides = [f"output_dir={output}", f"cache_dir_vae={output}/vae", f"cache_dir_text={output}/text"]
    command = [sys.executable, "-m", "simpletuner.train", "--config", "config/config.json", *overrides]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def finished(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "output"
    done = run_demo(repository, output)
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def test_demo_trains_validates_and_says_where_everything_lies(finished: tuple[Path, str]) -> None:
    output, said = finished
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
    for step in (0, 30, 60):
        grid = Image.open(output / "validation" / f"step-{step}" / "grid.png")
        assert grid.width > 2 * 64, "base model beside trained"
    for name in ("pytorch_lora_weights.safetensors", "checkpoint-60", "validation/step-60/grid.png"):
        assert (output / name).exists()
        assert str(output / name) in said


def test_demo_started_again_says_that_it_is_finished_and_how_to_start_another(
    finished: tuple[Path, str], repository: Path
) -> None:
    output, _ = finished
    weights = (output / "pytorch_lora_weights.safetensors").read_bytes()
    again = run_demo(repository, output)
    assert again.returncode == 0
    assert "finished" in again.stderr
    assert "max_train_steps" in again.stderr
    assert (output / "pytorch_lora_weights.safetensors").read_bytes() == weights


def test_adapter_of_the_demo_loads_into_its_pipeline(finished: tuple[Path, str], repository: Path) -> None:
    output, _ = finished
    pipeline = StableDiffusionXLPipeline.from_pretrained(repository / "simpletuner" / "demo" / "sdxl")
    adapter = load_adapter(pipeline.unet, output / "pytorch_lora_weights.safetensors")
    assert adapter.num_layers == 80
    assert adapter.tlora_config == {
        "max_rank": 8,
        "min_rank": 1,
        "alpha": 1.0,
        "schedule": "floor",
        "num_timesteps": 1000,
    }

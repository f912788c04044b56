"""The embedded demo, as a user runs it: config/config.json from the repository's root."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.models.sdxl.pipeline import StableDiffusionXLPipeline
from simpletuner.helpers.sampling.images import LABEL_WIDTH_PX, MARGIN_PX, SMALLEST_CELL_PX
from tests.integration.processes import start

pytestmark = pytest.mark.timeout(900)  # two runs, on a machine that may be busy
STEPS = 4
SHORTER = {"max_train_steps": STEPS, "validation_num_inference_steps": 2}
"""Instead of the demo's own numbers, for both runs."""


@pytest.fixture(scope="module")
def finished(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo in a folder that looks like a clone, where it may leave its output."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "simpletuner").symlink_to(repository / "simpletuner")
    shutil.copytree(repository / "config", folder / "config")
    for file in ("config.json", "examples/demo-lora/config.json"):
        shorter = json.loads((folder / "config" / file).read_text()) | SHORTER
        (folder / "config" / file).write_text(json.dumps(shorter))
    command = [sys.executable, "-m", "simpletuner.train"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_demo_trains_validates_and_says_where_everything_lies(finished: tuple[Path, str]) -> None:
    output, said = finished[0] / "output" / "demo", finished[1]
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    for name in (
        "pytorch_lora_weights.safetensors",
        f"checkpoint-{STEPS}",
        f"validation/step-{STEPS}/grid.png",
    ):
        assert (output / name).exists()
        assert str(output / name) in said


def test_demo_shows_base_lora_and_t_lora_side_by_side(finished: tuple[Path, str]) -> None:
    folder, said = finished
    assert "config/examples/demo-lora/config.json" in said
    assert (folder / "output" / "demo-lora" / "pytorch_lora_weights.safetensors").is_file()
    pictures = folder / "output" / "demo" / "validation"
    prompts = json.loads((folder / "config" / "prompts.json").read_text())
    assert len(list((pictures / "base").glob("*.png"))) == 2 * len(prompts)
    with Image.open(pictures / f"step-{STEPS}" / "grid.png") as grid:
        columns = (grid.width - LABEL_WIDTH_PX - MARGIN_PX) // (SMALLEST_CELL_PX + MARGIN_PX)
    assert columns == 3


def test_demo_started_again_says_that_it_is_finished_and_how_to_start_another(
    finished: tuple[Path, str], repository: Path
) -> None:
    folder, _ = finished
    output = folder / "output" / "demo"
    weights = (output / "pytorch_lora_weights.safetensors").read_bytes()
    again = start(repository / "simpletuner" / "train.py", cwd=folder)
    assert again.wait() == 0
    assert "finished" in again.errors()
    assert "max_train_steps" in again.errors()
    assert (output / "pytorch_lora_weights.safetensors").read_bytes() == weights


def test_adapter_of_the_demo_loads_into_its_pipeline(finished: tuple[Path, str], repository: Path) -> None:
    output = finished[0] / "output" / "demo"
    pipeline = StableDiffusionXLPipeline.from_pretrained(repository / "simpletuner" / "demo" / "sdxl")
    adapter = load_adapter(pipeline.unet, output / "pytorch_lora_weights.safetensors")
    assert adapter.num_layers == 70
    assert adapter.tlora_config == {
        "max_rank": 16,
        "min_rank": 8,
        "alpha": 1.0,
        "schedule": "floor",
        "num_timesteps": 1000,
    }

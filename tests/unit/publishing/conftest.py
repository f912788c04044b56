"""The output folder of a run, and a hub for the client in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.publishing import hub as client
from tests.hub_server import TOKEN, HubServer, serve

PROMPT = "a photo of sks cat"
CONFIG = {
    "model_family": "sdxl",
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
    "lora_type": "lycoris",
    "lycoris_config": {"algo": "tlora", "linear_dim": 8, "linear_alpha": 8, "tlora_min_rank": 2},
    "data_backend_config": [
        {"id": "photos", "instance_data_dir": "/private/place/photos", "instance_prompt": "sks cat"}
    ],
    "cache_dir_vae": "/private/place/cache/vae",
    "learning_rate": 1e-4,
    "seed": 42,
    "validation_resolution": ["64x64"],
    "validation_num_inference_steps": 2,
    "validation_guidance": 5.0,
    "tracker_project_name": "simpletuner",
    "hub_model_id": None,
    "model_card_private": True,
}
SCHEDULE = {"max_rank": 8, "min_rank": 2, "alpha": 1.0, "schedule": "floor", "num_timesteps": 1000}


def write_adapter(file: Path, *, value: float = 1.0, steps: int = 4, **header: str) -> None:
    """An adapter file of one layer."""
    metadata = {
        "base_model": "/private/place/model",
        "model_family": "sdxl",
        "steps": str(steps),
        "tlora_config": json.dumps(SCHEDULE),
        "ss_num_train_images": "3",
    }
    tensors = {"lycoris_a.lora_up.weight": torch.full((2, 2), value)}
    adapter_file.write(file, tensors, metadata=metadata | header)


def write_run(folder: Path, **keys: object) -> Path:
    """The files of a finished run that the card and the upload read."""
    folder.mkdir(parents=True, exist_ok=True)
    shots = [
        {"name": f"{index:02d}-cat", "prompt": f"{PROMPT} {index}", "size": "64x64", "seed": 7}
        for index in range(2)
    ]
    (folder / "config.resolved.json").write_text(json.dumps(CONFIG | keys))
    (folder / "run.json").write_text(json.dumps({"shots": shots}))
    write_adapter(folder / "pytorch_lora_weights.safetensors")
    for step in (2, 4):
        images = folder / "validation" / f"step-{step}"
        images.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate([*(each["name"] for each in shots), "grid"]):
            Image.new("RGB", (8, 8), (step, number, 0)).save(images / f"{name}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a finished run."""
    return write_run(tmp_path / "my-cat")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that the client of this process asks, with a login, the large-file protocol and short pauses."""
    with serve(HubServer()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub

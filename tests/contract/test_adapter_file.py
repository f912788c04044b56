"""The adapter file's keys, header and numbers, as other programs and older files know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from simpletuner.helpers.adapters.network import attach_adapter
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models.sdxl.spec import SPEC

LYCORIS_JSON = {
    "algo": "tlora",
    "multiplier": 1.0,
    "linear_dim": 4,
    "linear_alpha": 2.0,
    "apply_preset": {"target_module": ["Attention"]},
    "tlora_min_rank": 2,
}
FACTOR_KEYS = {
    "q_layer.weight",
    "p_layer.weight",
    "lambda_layer",
    "alpha",
    "base_q",
    "base_p",
    "base_lambda",
    "tlora_schedule",
}
VANILLA_KEYS = {"lora_down.weight", "lora_up.weight", "alpha", "tlora_schedule"}


class Attention(nn.Module):
    """The class name is what the target names."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([Attention()])


def _save(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    denoiser = Denoiser().requires_grad_(False).eval()
    values = LYCORIS_JSON | changes
    config = LycorisConfig.model_validate(values | {"raw": values})
    adapter = attach_adapter(denoiser, AdapterConfig(lora_type="lycoris"), lycoris=config, spec=SPEC, seed=0)
    file = folder / "pytorch_lora_weights.safetensors"
    adapter.save(file, metadata={"model_family": "sdxl"})
    return file


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118  no mapping


@pytest.mark.parametrize(
    ("init", "keys"), [("random", FACTOR_KEYS), ("weight", FACTOR_KEYS), ("vanilla", VANILLA_KEYS)]
)
def test_the_keys_are_lycoris_layout_with_the_base_factors(tmp_path: Path, init: str, keys: set[str]) -> None:
    tensors, _ = _read(_save(tmp_path, tlora_init=init))
    assert set(tensors) == {f"lycoris_block_0_to_q.{key}" for key in keys}
    assert tensors["lycoris_block_0_to_q.alpha"].item() == 2.0


def test_the_factors_have_lycoris_shapes(tmp_path: Path) -> None:
    tensors, _ = _read(_save(tmp_path))
    shapes = {key.partition(".")[2]: tuple(each.shape) for key, each in tensors.items()}
    assert shapes["q_layer.weight"] == shapes["base_q"] == (4, 8)
    assert shapes["p_layer.weight"] == shapes["base_p"] == (6, 4)
    assert shapes["lambda_layer"] == shapes["base_lambda"] == (1, 4)


def test_the_header_states_the_schedule_and_the_users_json(tmp_path: Path) -> None:
    _, header = _read(_save(tmp_path))
    assert json.loads(header["tlora_config"]) == {
        "max_rank": 4,
        "min_rank": 2,
        "alpha": 1.0,
        "schedule": "floor",
        "num_timesteps": 1000,
    }
    assert json.loads(header["lycoris_config"]) == LYCORIS_JSON
    assert header["model_family"] == "sdxl"
    assert set(json.loads(header["base_weights_hash"])) == {"lycoris_block_0_to_q"}

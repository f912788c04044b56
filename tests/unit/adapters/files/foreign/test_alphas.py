"""The alpha that PEFT's configuration states for a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.alphas import complete_alphas, config_of, stated_alpha
from simpletuner.helpers.adapters.files.foreign.keys import split_keys
from simpletuner.helpers.errors import AdapterError

FILE = Path("adapter.safetensors")
LAYER = "blocks.1.proj"


def alpha(config: dict[str, Any], layer: str = LAYER) -> float:
    return stated_alpha(layer, config, rank=4, path=FILE)


@pytest.mark.parametrize(
    ("pattern", "is_named"),
    [
        (f"^{LAYER}", True),
        (r"^blocks\.1\.proj$", True),
        (LAYER, True),
        ("proj", True),
        ("1.proj", True),
        ("^proj", False),
        ("roj", False),
        ("^blocks.1", False),
        ("blocks", False),
        (".*", False),
        (r"blocks\.\d\.proj", False),
        ("blocks.1.pro.", False),
    ],
)
def test_pattern_is_a_whole_path_or_its_end_to_the_letter(pattern: str, is_named: bool) -> None:
    assert alpha({"lora_alpha": 8, "alpha_pattern": {pattern: 2}}) == (2 if is_named else 8)


@pytest.mark.timeout(10)
def test_pattern_that_would_run_for_ever_as_a_regular_expression_names_nothing() -> None:
    layer = ".".join("proj" for _ in range(20))
    assert alpha({"lora_alpha": 8, "alpha_pattern": {"(([a-z.]+)+)+!": 2}}, layer) == 8


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 4),
        ({"lora_alpha": 8}, 8),
        ({"alpha": 8}, 8),
        ({"lora_alpha": 8, "use_rslora": True}, 16),
        ({"use_rslora": True}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 2, LAYER: 3}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": None}, 8),
        ({"lora_alpha": 8, "alpha_pattern": ["proj"]}, 8),
    ],
    ids=["nothing", "lora", "others", "rslora", "rslora alone", "first pattern", "no patterns", "list"],
)
def test_alpha_is_the_layers_own_else_the_common_one_else_its_rank(
    config: dict[str, Any], expected: float
) -> None:
    assert alpha(config) == expected


@pytest.mark.parametrize("value", ["8", True, float("inf"), [8]])
def test_alpha_that_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(AdapterError, match=rf"{FILE}.*{LAYER}"):
        alpha({"alpha_pattern": {"proj": value}})


def test_config_of_a_component_leaves_out_those_of_the_others() -> None:
    metadata = {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2, "unet.r": 4}
    assert config_of({"unet", "transformer"}, metadata) == {"lora_alpha": 8, "r": 4}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 2}, 1.0),
        ({"r": 4}, 1.0),
        ({"alpha": 2, "r": 4}, 0.5),
        ({"alpha": 2, "r": 0}, 1.0),
    ],
    ids=str,
)
def test_scale_of_a_lokr_of_two_whole_factors_is_in_the_first(config: dict[str, float], scale: float) -> None:
    tensors = {"unet.proj.lokr_w1": torch.ones(2, 2), "unet.proj.lokr_w2": torch.ones(3, 3)}
    stated = {f"unet.{key}": value for key, value in config.items()}
    file = AdapterFile(FILE, tensors, {METADATA_KEY: json.dumps(stated)})
    layer = complete_alphas(file, split_keys(file))["proj"]
    assert torch.equal(layer["lokr_w1"], torch.full((2, 2), scale))
    assert torch.equal(layer["lokr_w2"], torch.ones(3, 3))

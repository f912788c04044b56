"""What an SDXL model's folder says of its UNet; test_family_contract.py has what all families share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.sdxl.components import SDXLComponents, find_components

CopySDXL = Callable[[], Path]


def components_of(folder: Path, **changes: object) -> SDXLComponents:
    values = {"model_family": "sdxl", "pretrained_model_name_or_path": str(folder), **changes}
    return find_components(ModelConfig.model_validate(values))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_find_components_finds_every_component(tiny_sdxl: Path) -> None:
    components = components_of(tiny_sdxl)
    assert components.denoiser.folder == tiny_sdxl / "unet"
    assert components.tokenizer_2.folder == tiny_sdxl / "tokenizer_2"
    assert components.empty_prompt_is_zero
    assert components.prediction_type(None) == "epsilon"
    assert not components.scheduler_is_zero_snr


def test_prediction_type_follows_the_user_then_the_model(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    components = components_of(folder)
    assert components.prediction_type(None) == "v_prediction"
    assert components.prediction_type("epsilon") == "epsilon"
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ModelError, match="'sample'"):
        components_of(folder).prediction_type(None)

"""Targets of translated LoRAs are the layers that the other programs adapt, on models of real size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.helpers.configuration.migration.adapters import expanded
from simpletuner.helpers.configuration.migration.table import load_table
from tests.integration.layer_table import MODELS

_KOHYA, _AI_TOOLKIT = load_table("kohya").facts["targets"], load_table("ai-toolkit").facts["targets"]
_ONE_TRAINER = load_table("onetrainer").facts
_FILTERS = _ONE_TRAINER["known_targets"]


def _names(fact: dict[str, Any]) -> list[str]:
    return expanded(fact["names"], fact.get("single_blocks", 1))


def _filtered(family: str, part: str) -> list[str]:
    return expanded(_FILTERS[family][part], _ONE_TRAINER["single_blocks"])


# Program -> (title of the model, target names, which layers the program adapts, by their path).
CASES: dict[str, tuple[str, Sequence[str], Callable[[str], bool]]] = {
    "kohya, SDXL": ("SDXL", _names(_KOHYA["sdxl"]), lambda path: ".attentions." in f".{path}"),
    "kohya, Flux.1": ("Flux.1", _names(_KOHYA["flux"]), lambda path: "transformer_blocks" in path),
    "ai-toolkit, SDXL": ("SDXL", _names(_AI_TOOLKIT["sdxl"]), lambda path: ".attentions." in f".{path}"),
    "ai-toolkit, Flux.1": ("Flux.1", _names(_AI_TOOLKIT["flux"]), lambda path: "transformer_blocks" in path),
    "OneTrainer, SDXL": ("SDXL", _filtered("sdxl", "attentions"), lambda path: "attentions" in path),
    "OneTrainer, Flux.1": ("Flux.1", _filtered("flux", "attn"), lambda path: "attn" in path),
    "OneTrainer, blocks": (
        "Flux.1",
        _filtered("flux", "transformer_block"),
        lambda path: "transformer_block" in path,
    ),
}


@pytest.mark.parametrize(("title", "names", "is_adapted"), CASES.values(), ids=CASES)
def test_the_target_names_are_the_layers_of_the_program(
    title: str, names: Sequence[str], is_adapted: Callable[[str], bool]
) -> None:
    denoiser = next(model for model in MODELS if model.title == title).denoiser
    layers = {path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    # PEFT takes a name for the end of a path.
    ours = {path for path in layers if any(path == name or path.endswith(f".{name}") for name in names)}
    theirs = {path for path in layers if is_adapted(path)}
    assert len(theirs) > 100
    assert ours == theirs
    assert all(parameter.device == torch.device("meta") for parameter in denoiser.parameters())

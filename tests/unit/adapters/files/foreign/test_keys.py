"""Which layer and part a key means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.helpers.adapters.files.adapter_file import AdapterFile
from simpletuner.helpers.adapters.files.foreign.keys import split_keys
from simpletuner.helpers.errors import AdapterError


@pytest.mark.parametrize("ending", ["lora_up.weight.bak", "lora_A.weight_2", "lokr_w1_c", "alpha.1"])
def test_key_that_goes_on_after_a_known_part_is_refused(ending: str) -> None:
    key = f"unet.proj.{ending}"
    with pytest.raises(AdapterError, match=f"{key} is no tensor"):
        split_keys(AdapterFile(Path("a.safetensors"), {key: torch.ones(2, 2)}, {}))


@pytest.mark.parametrize(
    ("part", "program"), [("oft_R", "OneTrainer"), ("oft_R.weight", "OneTrainer"), ("vera_lambda_b", "VeRA")]
)
def test_tensor_that_nothing_here_computes_is_refused_with_its_program(part: str, program: str) -> None:
    with pytest.raises(AdapterError, match=program):
        split_keys(AdapterFile(Path("a.safetensors"), {f"unet.proj.{part}": torch.ones(2, 2)}, {}))

"""LoRA files of other programs under the keys that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.diffusers_layout import in_diffusers_layout

DOWN, UP = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.ones(3, 2)
KOHYA = {"lora_unet_proj.lora_down.weight": DOWN, "lora_unet_proj.lora_up.weight": UP}
OWN = {"unet.proj.lora_A.weight": DOWN, "unet.proj.lora_B.weight": UP}
PEFT = {f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in OWN.items()}
HEADER = {METADATA_KEY: json.dumps({"unet.lora_alpha": 8})}


def converted(tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    denoiser = nn.ModuleDict({"proj": nn.Linear(6, 3)})
    file = AdapterFile(Path("a.safetensors"), tensors, {"trigger": "sks", **metadata})
    return in_diffusers_layout(file, denoiser, prefix="unet")


@pytest.mark.parametrize(
    ("tensors", "metadata", "scale"),
    [
        (KOHYA, {}, 1),
        (KOHYA | {"lora_unet_proj.alpha": torch.tensor(8.0)}, {}, 4),
        (OWN | {"unet.proj.alpha": torch.tensor(8.0)}, {}, 4),
        (PEFT, HEADER, 4),
    ],
    ids=["kohya", "kohya with alpha", "diffusers with alpha", "peft with a header"],
)
def test_alpha_is_folded_into_the_second_factor(
    tensors: dict[str, Tensor], metadata: dict[str, str], scale: float
) -> None:
    found = converted(tensors, metadata)
    assert found.tensors.keys() == OWN.keys()
    assert torch.equal(found.tensors["unet.proj.lora_A.weight"], DOWN)
    assert torch.equal(found.tensors["unet.proj.lora_B.weight"], UP * scale)
    assert found.metadata == {"trigger": "sks"}, "a header that stated alpha would now state it twice"


def test_file_in_the_layout_with_its_header_stays_as_it_is() -> None:
    found = converted(OWN, HEADER)
    assert (found.tensors, found.metadata) == (OWN, {"trigger": "sks", **HEADER})


def test_magnitudes_are_a_vector() -> None:
    found = converted(KOHYA | {"lora_unet_proj.dora_scale": torch.arange(3.0)[:, None]}, {})
    assert torch.equal(found.tensors["unet.proj.lora_magnitude_vector"], torch.arange(3.0))

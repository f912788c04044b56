"""Files that PEFT, diffusers and LyCORIS's front for kohya's scripts write themselves."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from lycoris.kohya import create_network
from lycoris.modules.tlora import TLoraModule
from lycoris.wrapper import network_module_dict
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from simpletuner.helpers.adapters.network import load_adapter
from tests.unit.adapters.files.foreign.makers import LAYERS, make

PATHS = [path for parts in LAYERS["sdxl"].values() for path in parts if "resnets" not in path]
FLUX_PATHS = [path for parts in LAYERS["flux"].values() for path in parts]


def shake(parameters: Any) -> None:
    """Move trained parameters off their start, the same each time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def assert_equal_layers(trained: nn.Module, loaded: nn.Module, base: nn.Module, paths: list[str]) -> None:
    """Each layer adds the same to its output, to 1e-4 of what it adds."""
    for path in paths:
        x = torch.randn(
            2, 5, base.get_submodule(path).in_features, generator=torch.Generator().manual_seed(6)
        )  # type: ignore[arg-type]
        with torch.no_grad():
            plain, expected, found = (model.get_submodule(path)(x) for model in (base, trained, loaded))
        assert (expected - plain).norm() > 1e-2
        assert (found - expected).norm() / (expected - plain).norm() < 1e-4, path


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=2, target_modules=PATHS),
        LoraConfig(r=4, lora_alpha=2, target_modules=PATHS, use_dora=True),
        LoraConfig(r=4, lora_alpha=2, target_modules=PATHS, use_rslora=True),
        LoraConfig(
            r=4, lora_alpha=2, target_modules=PATHS, alpha_pattern={PATHS[0]: 7}, rank_pattern={PATHS[1]: 3}
        ),
        LoHaConfig(r=4, alpha=2, target_modules=PATHS),
        LoKrConfig(r=4, alpha=2, target_modules=PATHS),
        LoKrConfig(r=1, alpha=2, target_modules=PATHS, decompose_both=True),
    ],
    ids=["lora", "dora", "rslora", "patterns", "loha", "lokr", "lokr, both split"],
)
def test_folder_that_peft_saves(config: Any, tmp_path: Path) -> None:
    trained = get_peft_model(make("sdxl"), copy.deepcopy(config))
    shake(parameter for parameter in trained.parameters() if parameter.requires_grad)
    trained.save_pretrained(tmp_path)
    loaded = make("sdxl")
    load_adapter(loaded, tmp_path / "adapter_model.safetensors")
    assert_equal_layers(trained.get_base_model(), loaded, make("sdxl"), PATHS)


@pytest.mark.parametrize("use_dora", [False, True])
def test_file_that_diffusers_saves(use_dora: bool, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata

    trained = make("flux")
    trained.add_adapter(LoraConfig(r=4, lora_alpha=3, target_modules=FLUX_PATHS, use_dora=use_dora))
    shake(parameter for parameter in trained.parameters() if parameter.requires_grad)
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained),
        **_collate_lora_metadata({"transformer": trained}),
    )
    loaded = make("flux")
    load_adapter(loaded, tmp_path / "pytorch_lora_weights.safetensors")
    assert_equal_layers(trained, loaded, make("flux"), FLUX_PATHS)


class TextEncoder(nn.Module):
    """Enough of a text encoder for the front to adapt it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CLIPAttention()


class CLIPAttention(nn.Module):
    """A class that the front targets."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)


@pytest.mark.parametrize(
    "values",
    [
        {"algo": "lora"},
        {"algo": "lora", "dora_wd": True, "wd_on_output": True},
        {"algo": "loha"},
        {"algo": "lokr", "factor": 4},
        {"algo": "lokr", "factor": 4, "full_matrix": True},
        {"algo": "full"},
        {"algo": "tlora"},  # which the front never masks
    ],
    ids=lambda values: " ".join(values),
)
def test_file_of_lycoris_through_kohyas_scripts(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(network_module_dict, "tlora", TLoraModule)  # in place of this program's
    monkeypatch.setattr(gc, "collect", lambda: 0)  # LyCORIS calls it for each of its T-LoRA layers
    trained = make("sdxl")
    encoders = [TextEncoder(), TextEncoder()]
    network = create_network(1.0, 4, 2.0, None, encoders, trained, preset="attn-mlp", **values)
    network.apply_to(encoders, trained, True, True)
    shake(network.parameters())
    # kohya's script writes the arguments of the network to the header.
    header = {"ss_network_args": json.dumps({key: str(value) for key, value in values.items()})}
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, header)
    loaded = make("sdxl")
    adapter = load_adapter(loaded, tmp_path / "a.safetensors")
    paths = [path for path in PATHS if ".attn" in path]
    assert adapter.num_layers >= len(paths)
    with adapter.rank_mask_for([900]):
        assert_equal_layers(trained, loaded, make("sdxl"), paths)

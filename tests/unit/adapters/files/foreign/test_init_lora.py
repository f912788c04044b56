"""init_lora from files of other programs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.models.sdxl.spec import SPEC
from tests.unit.adapters.attaching import attach
from tests.unit.adapters.files.foreign.makers import (
    LAYERS,
    Made,
    lora,
    make,
    original_file,
    own_file,
    worst_error,
)
from tests.unit.adapters.files.foreign.test_standard_lora import TOLERANCE, peft, underscored
from tests.unit.adapters.files.foreign.test_tlora_of_others import LAYOUTS, R, build, floored, worst

PATHS = [path for parts in LAYERS["sdxl"].values() for path in parts]
NAMES = {"target_name": [f"{path.replace('.', '[.]')}$" for path in PATHS]}
KOHYA = underscored("lora_unet_")


def lycoris(algo: str, **values: Any) -> dict[str, Any]:
    return {
        "algo": algo,
        "multiplier": 1.0,
        "linear_dim": 4,
        "linear_alpha": 4.0,
        "apply_preset": NAMES,
    } | values


@pytest.mark.parametrize("algo", ["lora", "tlora"])
def test_lycoris_adapter_starts_as_the_file_of_another_program(algo: str, tmp_path: Path) -> None:
    made = original_file("sdxl", lora, key=KOHYA, alpha=4.0)
    values = lycoris(algo) | ({"tlora_init": "vanilla", "tlora_min_rank": 4} if algo == "tlora" else {})
    model = make("sdxl")
    adapter = attach(model, values, spec=SPEC, init_lora=made.save(tmp_path / "a.safetensors"))
    with adapter.rank_mask_for([500]):
        assert worst_error(model, made) < TOLERANCE


@pytest.mark.parametrize("names", [KOHYA, peft("base_model.model.")], ids=["kohya", "peft"])
def test_standard_adapter_starts_as_the_file_of_another_program(names: Any, tmp_path: Path) -> None:
    if names is KOHYA:
        made = original_file("sdxl", lora, key=names, alpha=2.0)
    else:
        made = own_file("sdxl", lora, key=names)
    model = make("sdxl")
    attach(
        model,
        lora_rank=4,
        lora_alpha=4,
        peft_lora_target_modules=PATHS,
        init_lora=made.save(tmp_path / "a.safetensors"),
    )
    assert worst_error(model, made) < TOLERANCE


def test_other_schedule_of_the_file_is_reported_and_the_runs_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, deltas = build("sdxl", LAYOUTS["sd-scripts fork"])
    values = lycoris("tlora", linear_dim=R, linear_alpha=4.0, tlora_min_rank=5)
    model = make("sdxl")
    with caplog.at_level(logging.WARNING):
        adapter = attach(model, values, spec=SPEC, init_lora=made.save(tmp_path / "a.safetensors"))
    assert "min_rank=2" in caplog.text
    assert "min_rank=5" in caplog.text
    assert worst(model, adapter, deltas, floored(5)) < TOLERANCE
    caplog.clear()
    attach(
        make("sdxl"),
        values | {"tlora_min_rank": 2, "tlora_alpha": 2.0},
        spec=SPEC,
        init_lora=tmp_path / "a.safetensors",
    )
    assert "tlora_schedule" not in caplog.text


def drop_a_layer(made: Made) -> None:
    for key in [key for key in made.tensors if "attn1_to_q" in key]:
        del made.tensors[key]


def add_a_layer(made: Made) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_q"
    made.tensors |= {
        f"{name}.lora_down.weight": torch.ones(4, 32),
        f"{name}.lora_up.weight": torch.ones(32, 4),
    }


def other_ranks(made: Made) -> None:
    for key, tensor in made.tensors.items():
        if "lora_down" in key:
            made.tensors[key] = torch.cat([tensor, tensor])
        if "lora_up" in key:
            made.tensors[key] = torch.cat([tensor, tensor], dim=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(drop_a_layer, "1 of its 9 layers"), (add_a_layer, "1 of the file's 10 layers"), (other_ranks, "shape")],
)
@pytest.mark.parametrize("algo", ["lora", "tlora"])
def test_file_that_does_not_fit_is_one_short_sentence(
    algo: str, damage: Any, message: str, tmp_path: Path
) -> None:
    made = original_file("sdxl", lora, key=KOHYA, alpha=4.0)
    damage(made)
    values = lycoris(algo) | ({"tlora_init": "vanilla"} if algo == "tlora" else {})
    with pytest.raises(AdapterError, match=message) as caught:
        attach(make("sdxl"), values, spec=SPEC, init_lora=made.save(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_file_of_another_algorithm_is_refused_for_a_standard_adapter(tmp_path: Path) -> None:
    tensors = {"lora_unet_middle_block_1_proj_in.diff": torch.ones(32, 32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="diff is not of a standard LoRA"):
        attach(make("sdxl"), lora_rank=4, init_lora=tmp_path / "a.safetensors")

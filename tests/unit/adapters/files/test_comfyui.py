"""Which files ComfyUI computes rightly, and the layers that an export only renames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simpletuner.helpers.adapters.files import comfyui
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.contracts import FusedSlice
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.models.sdxl.spec import SPEC
from tests.unit.adapters.attaching import lycoris_config

NAMES = {"proj": FusedSlice("joined", (1,), 3), "conv": "input.1", "mid": "middle"}
FAMILY = replace(SPEC, original_name=lambda path: NAMES[path])
DORA_IN = {"weight_decompose": True, "wd_on_out": False}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(24, 32)
        self.mid = nn.Linear(32, 16)
        self.conv = nn.Conv2d(8, 16, 3)


def saved(folder: Path, family: str = "sdxl", **values: Any) -> Path:
    config = {"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2.0} | values
    config["apply_preset"] = {"target_name": ["proj", "mid", "conv"]}
    model = Model().requires_grad_(False)
    adapter = LycorisAdapter.create(model, lycoris_config(config), spec=FAMILY, seed=0)
    file = folder / "adapter.safetensors"
    adapter.save(file, metadata={"model_family": family})
    return file


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"algo": "lora"}, None),
        ({"algo": "loha"}, None),
        ({"algo": "lokr", "factor": 2}, None),
        ({"algo": "dylora", "block_size": 2}, None),
        ({"algo": "glora"}, None),
        ({"algo": "boft"}, None),
        ({"algo": "full"}, None),
        ({"algo": "lora", **DORA_IN}, None),
        ({"algo": "tlora", "tlora_init": "vanilla"}, None),
        ({"algo": "tlora"}, comfyui.SCHEDULE),
        ({"algo": "loha", "weight_decompose": True}, comfyui.OUTPUT_DORA),
        ({"algo": "lokr", "factor": 2, "linear_dim": 1, "use_tucker": True}, comfyui.TUCKER),
        ({"algo": "ia3"}, comfyui.IA3),
        ({"algo": "diag-oft"}, comfyui.DIAG_OFT),
        ({"algo": "diag-oft", "rescaled": True}, comfyui.RESCALED),
    ],
    ids=str,
)
def test_limits_are_found_in_the_shapes_of_a_trained_file(
    values: dict[str, Any], limit: comfyui.Limit | None, tmp_path: Path
) -> None:
    file = saved(tmp_path, **values)
    shapes = {key: tensor.shape for key, tensor in load_file(file).items()}
    assert comfyui.limit_of_file(shapes) == limit
    line = comfyui.advice_for(file)
    assert (limit is None) == line.startswith("reads this file")
    assert limit is None or limit.text in line
    assert ("simpletuner export" in line) == (limit is comfyui.SCHEDULE)
    assert inspect(file).comfyui == line
    assert line in inspect(file).text()


def test_exported_file_is_named_and_a_vanilla_file_is_said_to_lose_its_schedule(tmp_path: Path) -> None:
    other = tmp_path / "comfy.safetensors"
    assert comfyui.advice_for(saved(tmp_path, algo="tlora"), exported=other).startswith(f"use {other}; ")
    vanilla = saved(tmp_path, algo="tlora", tlora_init="vanilla")
    assert "LoRA, without its rank schedule" in comfyui.advice_for(vanilla)
    kronecker = saved(tmp_path, algo="tlokr", factor=2, linear_dim=2)
    assert "LoKr, without its rank schedule" in comfyui.advice_for(kronecker)


@pytest.mark.parametrize(
    ("keys", "limit"),
    [
        (["unet.mid.lora_A.weight", "unet.mid.lora_B.weight"], comfyui.NO_ATTENTION),
        (["transformer.mid.lora_A.weight"], None),
        (["transformer.x.lora_A.weight", "transformer.x.lora_magnitude_vector"], comfyui.PEFT_DORA),
        (["unet.x.lora_A.weight", "unet.x.lora_magnitude_vector"], comfyui.PEFT_DORA),
        (
            ["lycoris_single_transformer_blocks_0_proj_mlp.diff",
             "lycoris_single_transformer_blocks_0_proj_mlp.diff_b"],
            comfyui.JOINED_BIASES,
        ),
        (["lycoris_x.diff", "lycoris_x.diff_b"], None),
    ],
)  # fmt: skip
def test_limits_of_whole_files(keys: list[str], limit: comfyui.Limit | None) -> None:
    assert comfyui.limit_of_file(dict.fromkeys(keys, (4, 4))) == limit


@pytest.mark.parametrize(
    "values",
    [{"algo": "loha"}, {"algo": "lokr", "factor": 2, "linear_dim": 2}, {"algo": "lora", **DORA_IN}],
    ids=str,
)
def test_loha_lokr_and_dora_keep_their_tensors_under_original_names(
    values: dict[str, Any], tmp_path: Path
) -> None:
    file = saved(tmp_path, **values)
    (exported,) = export_adapter(
        file, tmp_path / "out", ExportOptions(layout="comfyui"), families={"sdxl": FAMILY}
    )
    assert exported.file == tmp_path / "out.safetensors"
    assert "3 layers with their own tensors" in exported.summary()
    before, after = load_file(file), load_file(exported.file)
    renamed = {"lycoris_mid": "lora_unet_middle", "lycoris_conv": "lora_unet_input_1"}
    expected = {
        f"{renamed.get(name, name)}.{part}": tensor
        for key, tensor in before.items()
        for name, _, part in [key.partition(".")]
    }
    assert after.keys() == expected.keys(), "a joined layer keeps the name by which its rows are found"
    assert all(torch.equal(after[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("values", "layout", "message"),
    [
        ({"algo": "loha", "weight_decompose": True}, "comfyui", "wd_on_out"),
        ({"algo": "lokr", "factor": 2, "linear_dim": 1, "use_tucker": True}, "kohya", "use_tucker"),
        ({"algo": "loha"}, "diffusers", "--format comfyui"),
        ({"algo": "ia3"}, "comfyui", "inspect"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    values: dict[str, Any], layout: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        export_adapter(
            saved(tmp_path, **values),
            tmp_path / "out.safetensors",
            ExportOptions(layout=layout),
            families={"sdxl": FAMILY},
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_fixed_rank_and_bands_say_what_becomes_of_the_schedule(tmp_path: Path) -> None:
    file = saved(tmp_path, algo="tlora")
    (fixed,) = export_adapter(file, tmp_path / "a", ExportOptions(rank=2), families={"sdxl": FAMILY})
    assert "no rank schedule" in fixed.summary()
    bands = export_adapter(file, tmp_path / "b", ExportOptions(bands=2), families={"sdxl": FAMILY})
    assert "use it at timesteps 0 to 499" in bands[0].summary()
    assert "use it at timesteps 500 to 1000" in bands[1].summary()
    plain = saved(tmp_path, algo="lora")
    (one,) = export_adapter(plain, tmp_path / "c", ExportOptions(), families={"sdxl": FAMILY})
    assert "schedule" not in one.summary()


def test_a_t_lokr_says_its_fixed_rank(tmp_path: Path) -> None:
    file = saved(tmp_path, algo="tlokr", factor=2, linear_dim=2)
    (fixed,) = export_adapter(
        file, tmp_path / "a", ExportOptions(layout="comfyui", rank=1), families={"sdxl": FAMILY}
    )
    assert "active rank 1" in fixed.summary()

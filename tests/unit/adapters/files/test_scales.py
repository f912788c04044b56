"""A file's tensors alone give the adapter's effect, by the formulas that every reader applies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.scales import rescaled
from simpletuner.helpers.adapters.network import LycorisAdapter, attach_adapter, load_adapter
from simpletuner.helpers.adapters.peft_lora import METADATA_KEY
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.sdxl.tiny import make_unet
from tests.unit.adapters.attaching import attach, lycoris_config

RANK, ALPHA = 4, 3.0
LAYERS = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon"},
    "rs_lora": {"algo": "lora", "rs_lora": True},
    "loha": {"algo": "loha"},
    "low-rank lokr": {"algo": "lokr", "factor": 2},
    "lokr of two low ranks": {"algo": "lokr", "factor": 4, "linear_dim": 1, "decompose_both": True},
    "whole lokr": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "glora": {"algo": "glora"},
    "dylora": {"algo": "dylora", "block_size": 2},
    "full": {"algo": "full"},
    "tlora random": {"algo": "tlora", "tlora_init": "random"},
    "tlora vanilla": {"algo": "tlora", "tlora_init": "vanilla"},
}
every_layer = pytest.mark.parametrize("values", LAYERS.values(), ids=LAYERS)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return make_unet().requires_grad_(False).eval()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(24, 32, bias=False)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


def json_of(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    common = {"multiplier": 0.5, "linear_dim": RANK, "linear_alpha": ALPHA}
    return common | values | {"apply_preset": {"target_name": ["proj"]}} | more


def trained(values: dict[str, Any]) -> tuple[Model, LycorisAdapter]:
    """An adapter whose every parameter has moved."""
    model = Model().requires_grad_(False).eval()
    adapter = LycorisAdapter.create(model, lycoris_config(values), spec=SPEC, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model, adapter


def effect(model: Model, adapter: LycorisAdapter) -> Tensor:
    """[O, I], the change of the layer's weight, at timestep 0 with every rank."""
    eye = torch.eye(24)
    with torch.no_grad(), adapter.rank_mask_for([0]):
        return (model.proj(eye) - Model().proj(eye)).T


def formula(layer: dict[str, Tensor], weight: Tensor) -> Tensor:
    """[O, I], the change of a weight by a file's tensors, in the words of the algorithms' papers."""
    t = {key.removesuffix(".weight"): tensor.double() for key, tensor in layer.items()}
    if "diff" in t:
        return t["diff"]
    alpha = float(t["alpha"])
    if "lora_up" in t:
        return alpha / len(t["lora_down"]) * t["lora_up"] @ t["lora_down"]
    if "hada_w1_a" in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return alpha / len(t["hada_w1_b"]) * product
    if "a1" in t:
        return alpha / len(t["a2"]) * (weight.double() @ t["a1"] @ t["a2"] + t["b1"] @ t["b2"])
    if "q_layer" in t:
        now = t["p_layer"] * t["lambda_layer"] @ t["q_layer"]
        return alpha / len(t["q_layer"]) * (now - t["base_p"] * t["base_lambda"] @ t["base_q"])
    low_rank = [t[key] for key in ("lokr_w1_b", "lokr_w2_b") if key in t]
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return (alpha / len(low_rank[0]) if low_rank else 1.0) * torch.kron(w1, w2)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@every_layer
def test_tensors_alone_give_the_effect_with_the_multiplier_in_it(
    values: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    model, adapter = trained(json_of(values))
    adapter.save(file, metadata={})
    layer = adapter_file.read(file).layers["lycoris_proj"]
    expected = effect(model, adapter).double()
    assert expected.norm() > 1e-2
    assert (formula(layer, Model().proj.weight) - expected).norm() < 1e-5 * expected.norm()
    stated = json.loads(header(file)["lycoris_config"])
    assert stated["multiplier"] == 1.0
    assert (header(file)["format_version"], header(file)["saved_multiplier"]) == ("2", "0.5")


@every_layer
def test_file_with_a_multiplier_loads_at_the_strength_of_its_training_and_saves_as_it_was(
    values: dict[str, Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model, adapter = trained(json_of(values))
    adapter.save(first, metadata={})
    fresh = Model().requires_grad_(False).eval()
    loaded = load_adapter(fresh, first)
    torch.testing.assert_close(effect(fresh, loaded), effect(model, adapter), rtol=0, atol=1e-5)
    loaded.save(second, metadata={})
    again, before = load_file(second), load_file(first)
    # Without rank, alpha says nothing.
    keys = [key for key in before if values["algo"] != "lokr" or not key.endswith(".alpha")]
    assert all(torch.equal(again[key], before[key]) for key in keys)


def test_factors_in_half_precision_are_rescaled_in_float32() -> None:
    layer = {
        "lora_up.weight": torch.tensor([[0.3]]).bfloat16(),
        "lora_down.weight": torch.ones(1, 1).bfloat16(),
    }
    found = rescaled(layer, 0.3)
    assert torch.equal(found["lora_up.weight"], layer["lora_up.weight"].float() * 0.3)
    assert found["lora_down.weight"] is layer["lora_down.weight"]
    assert rescaled(layer, 1) == layer


def test_norms_carry_the_multiplier_in_their_differences(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    preset = {"target_name": ["proj", "norm"]}
    model, adapter = trained(json_of({"algo": "lora", "train_norm": True}, apply_preset=preset))
    adapter.save(file, metadata={})
    stored, x = load_file(file), torch.randn(5, 32)
    weight = 1 + stored["lycoris_norm.w_norm"]
    expected = nn.functional.layer_norm(x, (32,), weight, stored["lycoris_norm.b_norm"])
    torch.testing.assert_close(model.norm(x), expected, rtol=0, atol=1e-5)


@every_layer
def test_header_without_a_version_gives_its_multiplier(values: dict[str, Any], tmp_path: Path) -> None:
    """Files of earlier releases hold the tensors at multiplier 1 and the multiplier in the header."""
    old, file = tmp_path / "old.safetensors", tmp_path / "a.safetensors"
    model, adapter = trained(json_of(values))
    adapter._multiplier = 1.0
    adapter.save(file, metadata={})
    entries = header(file)
    del entries["format_version"], entries["saved_multiplier"]
    stated = json.loads(entries["lycoris_config"]) | {"multiplier": 0.5}
    save_file(load_file(file), old, metadata=entries | {"lycoris_config": json.dumps(stated)})
    fresh = Model().requires_grad_(False).eval()
    expected = effect(model, adapter)
    torch.testing.assert_close(effect(fresh, load_adapter(fresh, old)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [{"algo": "ia3"}, {"algo": "diag-oft"}, {"algo": "boft"}, {"algo": "lora", "weight_decompose": True}],
    ids=str,
)
def test_multiplier_that_no_tensor_can_carry_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    _, adapter = trained(json_of(values))
    with pytest.raises(AdapterError, match=r"lycoris_proj.*multiplier 0\.5"):
        adapter.save(tmp_path / "a.safetensors", metadata={})
    assert not list(tmp_path.iterdir())


@every_layer
def test_init_lora_keeps_the_effect_at_another_alpha_and_multiplier(
    values: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    model, adapter = trained(json_of(values))
    adapter.save(file, metadata={})
    fresh = Model().requires_grad_(False).eval()
    other = LycorisAdapter.create(
        fresh, lycoris_config(json_of(values, linear_alpha=8.0, multiplier=2.0)), spec=SPEC, seed=5
    )
    other.init_from(file)
    torch.testing.assert_close(effect(fresh, other), effect(model, adapter), rtol=0, atol=1e-5)
    module = other.network.loras[0]
    if values["algo"] not in ("lokr", "full"):
        assert float(module.alpha) == pytest.approx(8.0 * (2.0 if "rs_lora" in values else 1.0))


def test_init_lora_takes_a_file_without_alpha_at_its_rank(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    model, adapter = trained(json_of({"algo": "lora"}, linear_alpha=RANK, multiplier=1.0))
    adapter.save(file, metadata={})
    tensors = {key: value for key, value in load_file(file).items() if not key.endswith(".alpha")}
    save_file(tensors, file)
    fresh = Model().requires_grad_(False).eval()
    values = json_of({"algo": "lora"}, linear_alpha=RANK / 2, multiplier=1.0)
    other = LycorisAdapter.create(fresh, lycoris_config(values), spec=SPEC, seed=5)
    other.init_from(file)
    torch.testing.assert_close(effect(fresh, other), effect(model, adapter), rtol=0, atol=1e-5)


def test_standard_lora_carries_its_scale_in_its_factors(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    model = unet()
    adapter = attach(model, lora_rank=4, lora_alpha=16.0)
    for parameter in adapter.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    adapter.save(file, metadata={})
    stated = json.loads(header(file)[METADATA_KEY])
    assert (stated["unet.r"], stated["unet.lora_alpha"]) == (4, 4)
    own = adapter.state_dict()
    for key, tensor in load_file(file).items():
        scale = 4.0 if ".lora_B." in key else 1.0
        assert torch.equal(tensor, own[key.removeprefix("unet.")] * scale)


@pytest.mark.parametrize(
    ("stated", "alpha"),
    [
        ("own", 4.0),
        (None, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {".*": 2}}, 8.0),
    ],
    ids=["own", "nothing", "a pattern that names no layer"],
)
def test_standard_init_lora_keeps_the_effect_at_another_alpha(
    stated: Any, alpha: float, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    first = attach(unet(), lora_rank=4)
    for parameter in first.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    first.save(file, metadata={})
    if stated != "own":
        save_file(load_file(file), file, None if stated is None else {METADATA_KEY: json.dumps(stated)})
    config = AdapterConfig.model_construct(
        **(dict(AdapterConfig(lora_rank=4, lora_alpha=1.0)) | {"init_lora": file})
    )
    second = attach_adapter(unet(), config, lycoris=None, spec=SPEC, seed=3)
    for key, tensor in first.state_dict().items():
        expected = tensor * alpha if ".lora_B." in key else tensor
        torch.testing.assert_close(second.state_dict()[key], expected)

"""Files whose layers are rebuilt: of older versions, without a header, and such as fit no layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.rebuilding import layers_with_bypass
from simpletuner.helpers.errors import AdapterError, ConfigError
from tests.unit.adapters.attaching import attach

INPUT = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.requires_grad_(False).eval()

    def forward(self) -> Tensor:
        return self.second(self.first(INPUT).sin())


def adapted(algo: str, preset: dict[str, Any] | None = None, **options: Any) -> tuple[Layers, LycorisAdapter]:
    """A model with an adapter of random parameters."""
    model = Layers()
    size = {"algo": algo, "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2.0}
    adapter = attach(model, size | options | {"apply_preset": {"target_name": [".*"]} | (preset or {})})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model, adapter


def saved(
    folder: Path, algo: str, preset: dict[str, Any] | None = None, **options: Any
) -> tuple[Path, Tensor]:
    """An adapter's file, and the output of the model that it was saved on."""
    model, adapter = adapted(algo, preset, **options)
    adapter.save(folder / "a.safetensors", metadata={})
    return folder / "a.safetensors", model()


def changed(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> Path:
    """The file with its tensors or its header changed."""
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors, header)
    save_file(tensors, file, header)
    return file


def loaded(file: Path) -> Tensor:
    model = Layers()
    load_adapter(model, file)
    return model()


def older(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """What a file of an older version held."""
    del header[adapter_file.OPTIONS_KEY]


def older_glora(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    older(tensors, header)
    for name in ("first", "second"):
        assert tensors[f"lycoris_{name}.alpha"] == 2.0 * 2  # times sqrt(R)
        tensors[f"lycoris_{name}.alpha"] = torch.tensor(2.0)


def older_lokr(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    older(tensors, header)
    for name in ("first", "second"):
        assert tensors[f"lycoris_{name}.alpha"] == 4.0
        tensors[f"lycoris_{name}.lokr_w1"] /= math.sqrt(4)
        tensors[f"lycoris_{name}.alpha"] = torch.tensor(4 * math.sqrt(4))


@pytest.mark.parametrize(
    ("algo", "options", "change"),
    [
        ("glora", {"rs_lora": True}, older_glora),
        ("lokr", {"rs_lora": True, "full_matrix": True}, older_lokr),
        ("diag-oft", {"bypass_mode": True}, older),
        ("boft", {"bypass_mode": True, "linear_dim": 6}, older),
        ("ia3", {"bypass_mode": "true"}, older),
        ("lora", {"rs_lora": True, "weight_decompose": True, "wd_on_out": False}, older),
    ],
)
def test_file_of_an_older_version_is_loaded_as_it_was_trained(
    algo: str, options: dict[str, Any], change: Callable[[Any, Any], None], tmp_path: Path
) -> None:
    file, expected = saved(tmp_path, algo, **options)
    torch.testing.assert_close(loaded(changed(file, change)), expected)


@pytest.mark.parametrize(("algo", "option"), [("diag-oft", "bypass_mode"), ("glora", "rs_lora")])
def test_an_option_of_single_layers_is_loaded_and_one_that_an_older_file_does_not_place_is_refused(
    algo: str, option: str, tmp_path: Path
) -> None:
    preset = {"name_algo_map": {"first": {option: True}}}
    file, expected = saved(tmp_path, algo, preset)
    torch.testing.assert_close(loaded(file), expected)
    with pytest.raises(AdapterError, match=rf"a\.safetensors: .*\b{option}\b"):
        loaded(changed(file, older))


def test_an_option_of_single_layers_that_their_tensors_show_is_loaded_from_an_older_file(
    tmp_path: Path,
) -> None:
    file, expected = saved(tmp_path, "lora", {"name_algo_map": {"first": {"rs_lora": True}}})
    torch.testing.assert_close(loaded(changed(file, older)), expected)


@pytest.mark.parametrize("algo", ["lora", "tlora"])
def test_a_tensor_of_lycoris_that_only_tells_its_dtype_is_passed_over(algo: str, tmp_path: Path) -> None:
    file, expected = saved(tmp_path, algo)
    torch.testing.assert_close(loaded(changed(file, put("dtype_tensor", torch.tensor(0.0)))), expected)


@pytest.mark.parametrize(
    ("options", "is_bypassed"), [({}, True), ({"weight_decompose": True}, False)], ids=["lora", "dora"]
)
def test_on_half_precision_a_lora_adds_to_the_output_and_a_dora_cannot(
    options: dict[str, Any], is_bypassed: bool, tmp_path: Path
) -> None:
    file, _ = saved(tmp_path, "lora", **options)
    adapter = load_adapter(Layers().to(torch.bfloat16), file)
    assert [bool(module.bypass_mode) for module in adapter.network.loras] == [is_bypassed] * 2


@pytest.mark.parametrize(
    ("stated", "names"),
    [
        (["lycoris_first"], {"lycoris_first"}),
        ([["lycoris_first"], 1, "lycoris_second"], {"lycoris_second"}),
        ("x", ()),
    ],
    ids=str,
)
def test_only_texts_of_a_list_name_layers_with_bypass_mode(stated: Any, names: Any) -> None:
    header = {adapter_file.OPTIONS_KEY: json.dumps({"bypass_mode": stated})}
    assert layers_with_bypass(adapter_file.AdapterFile(Path("a"), {}, header)) == names


@pytest.mark.parametrize(("groups", "is_bypassed"), [(1, True), (2, False)])
def test_bypass_mode_is_not_for_grouped_convolutions(groups: int, is_bypassed: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups)).requires_grad_(False).eval()
    size = {"algo": "lora", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2.0}
    adapter = attach(model, size | {"bypass_mode": True, "apply_preset": {"target_name": [".*"]}})
    adapter.save(tmp_path / "a.safetensors", metadata={})
    adapter.detach()
    stated = json.dumps({"bypass_mode": ["lycoris_0"]})
    file = changed(
        tmp_path / "a.safetensors", lambda _, header: header.update({adapter_file.OPTIONS_KEY: stated})
    )
    (module,) = load_adapter(model, file).network.loras
    assert bool(module.bypass_mode) is is_bypassed
    assert model(torch.zeros(1, 8, 5, 5)).shape == (1, 8, 3, 3)


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("lora", {"weight_decompose": True, "wd_on_out": False}),
        ("loha", {"weight_decompose": True, "wd_on_out": False}),
        ("lokr", {"factor": 2, "unbalanced_factorization": True, "weight_decompose": True}),
        ("lokr", {"factor": -1, "linear_dim": 1, "decompose_both": True, "unbalanced_factorization": True}),
        ("lokr", {"full_matrix": True, "rs_lora": True}),
        ("glora", {"rs_lora": True}),
    ],
)
def test_shapes_alone_say_how_a_file_without_header_was_trained_to_lycoris_too(
    algo: str, options: dict[str, Any], tmp_path: Path
) -> None:
    file, expected = saved(tmp_path, algo, **options)
    torch.testing.assert_close(loaded(changed(file, lambda _, header: header.clear())), expected)
    model = Layers()
    network, _ = create_lycoris_from_weights(1.0, "", model, weights_sd=load_file(file))
    network.merge_to(1.0)
    torch.testing.assert_close(model(), expected)


def test_factors_without_an_alpha_have_their_rank_as_alpha(tmp_path: Path) -> None:
    for algo in ("lora", "loha", "lokr", "glora"):
        options = (
            {"factor": 2, "linear_dim": 1, "linear_alpha": 1.0} if algo == "lokr" else {"linear_alpha": 4.0}
        )
        file, expected = saved(tmp_path, algo, **options)
        without = changed(
            file, lambda tensors, _: [tensors.pop(f"lycoris_{name}.alpha") for name in ("first", "second")]
        )
        torch.testing.assert_close(loaded(without), expected)


def put(part: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    """A change of one tensor of the first layer; None removes it."""

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors.pop(f"lycoris_first.{part}", None)
        if tensor is not None:
            tensors[f"lycoris_first.{part}"] = tensor

    return change


@pytest.mark.parametrize(
    ("algo", "part", "tensor", "message"),
    [
        ("lora", "lora_up.weight", torch.ones(1, 4), r"lora_up\.weight.*\(12, 4\)"),  # LyCORIS broadcasts it
        ("lora", "lora_dwn.weight", torch.ones(4, 8), r"lora_dwn\.weight"),
        ("lora", "dora_scale", torch.ones(8, 1), r"dora_scale.*\(8, 1\).*\(12, 1\).*wd_on_out.*\(1, 8\)"),
        ("lora", "lora_up.weight", None, r"lora_down\.weight.*no known algorithm"),
        ("loha", "hada_t1", torch.ones(4, 4), "do not fit"),
        ("loha", "hada_w2_b", torch.ones(4, 1), r"hada_w2_b.*\(4, 8\)"),
        ("lokr", "lokr_w1", torch.ones(2, 4), r"\b8x16\b"),
        ("lokr", "lokr_w2", torch.ones(4, 8), r"\b12x16\b"),
        ("lokr", "lokr_t2", torch.ones(4, 4), r"lokr_t2.*Kronecker"),
        ("ia3", "weight", torch.ones(1), r"weight.*\(12,\)"),
        ("full", "diff", torch.ones(12, 1), r"diff.*\(12, 8\)"),
        ("diag-oft", "rescale", torch.ones(1, 1), r"rescale.*\(12,\)"),
    ],
)
def test_tensor_that_is_not_a_layers_own_is_refused_by_name_and_nothing_is_attached(
    algo: str, part: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    file, _ = saved(tmp_path, algo, full_matrix=algo == "lokr")
    changed(file, put(part, tensor))
    model = Layers()
    with pytest.raises(AdapterError, match=rf"a\.safetensors: lycoris_first: .*{message}"):
        load_adapter(model, file)
    assert not list(model.first.children())


@pytest.mark.parametrize(
    ("algo", "options", "message"),
    [
        ("lora", {"weight_decompose": True}, "weight_decompose"),
        ("diag-oft", {}, "bypass_mode"),
        ("diag-oft", {"bypass_mode": True}, None),
        ("loha", {}, None),
    ],
)
def test_layer_that_adds_to_the_weight_alone_is_refused_on_a_packed_one(
    algo: str, options: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, expected = saved(tmp_path, algo, **options)
    monkeypatch.setattr("simpletuner.helpers.adapters.rebuilding.is_quantized", lambda _: True)
    if message is None:
        torch.testing.assert_close(loaded(file), expected)
        return
    with pytest.raises(AdapterError, match=rf"lycoris_first\b.*{message}"):
        loaded(file)


def test_rank_dropout_of_norms_and_glora_drops_the_named_share() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(1000), nn.Linear(1000, 1000, bias=False)

    options = {"train_norm": True, "rank_dropout": 0.25, "bypass_mode": True, "linear_dim": 1000}
    size = {"algo": "glora", "multiplier": 1.0, "linear_alpha": 1000.0}
    model = Norms().requires_grad_(False).train()
    adapter = attach(model, size | options | {"apply_preset": {"target_name": [".*"]}})
    layers = {module.lora_name: module for module in adapter.network.loras}
    with torch.no_grad():
        layers["lycoris_norm"].b_norm.fill_(1.0)
        for factor in (layers["lycoris_linear"].b1, layers["lycoris_linear"].b2):
            factor.weight.copy_(torch.eye(1000))
    torch.manual_seed(0)
    for added in (
        model.norm(torch.zeros(1, 1000)),
        model.linear(torch.ones(1, 1000)) - model.linear.weight.sum(1),
    ):
        assert (added > 0.5).float().mean().item() == pytest.approx(0.75, abs=0.05)


def test_header_lists_the_layers_with_bypass_mode(tmp_path: Path) -> None:
    file, _ = saved(tmp_path, "lora", {"name_algo_map": {"first": {"bypass_mode": True}}})
    entry = adapter_file.read(file).metadata[adapter_file.OPTIONS_KEY]
    assert json.loads(entry) == {"bypass_mode": ["lycoris_first"]}


@pytest.mark.parametrize(
    ("algo", "options", "alpha"),
    [("glora", {"rs_lora": True}, 2.0), ("lokr", {"rs_lora": True, "full_matrix": True}, 4 * math.sqrt(4))],
)
def test_scale_of_rs_lora_survives_init_lora_and_a_checkpoint_of_an_older_version(
    algo: str, options: dict[str, Any], alpha: float, tmp_path: Path
) -> None:
    file, expected = saved(tmp_path, algo, **options)
    started, adapter = adapted(algo, **options)
    adapter.init_from(file)
    torch.testing.assert_close(started(), expected)
    state = adapter.state_dict()
    resumed, other = adapted(algo, **options)
    other.load_state_dict(
        {key: torch.tensor(alpha) if "alpha" in key else each for key, each in state.items()}
    )
    torch.testing.assert_close(resumed(), expected)
    other.save(file, metadata={})
    torch.testing.assert_close(loaded(file), expected)


def test_norms_that_cannot_be_trained_are_no_layers_and_the_only_ones_are_refused() -> None:
    size = {"algo": "lora", "multiplier": 1.0, "linear_dim": 2, "linear_alpha": 2.0, "train_norm": True}
    options = size | {"apply_preset": {"target_name": [".*"]}}
    plain, affine = nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4)
    layers = {
        "linear": nn.Linear(4, 4),
        "plain": plain,
        "rms": nn.RMSNorm(4),
        "no_bias": nn.LayerNorm(4, bias=False),
    }
    with pytest.raises(ConfigError, match="train_norm"):
        attach(nn.ModuleDict(layers), options)
    adapter = attach(nn.ModuleDict(layers | {"affine": affine}), options)
    assert {module.lora_name for module in adapter.network.loras} == {"lycoris_linear", "lycoris_affine"}

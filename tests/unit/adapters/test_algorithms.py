"""Every algorithm of the defaults on real models of toy size: made or refused, trained, saved, read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lycoris import modules as lycoris_modules
from lycoris import wrapper as lycoris_wrapper
from torch import Tensor, nn

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.lycoris_layers import REPLACED, DyLoraLayer, FullLayer, NormLayer
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.choices.algorithms import ALGORITHMS as RECORDS
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux import tiny as tiny_flux
from simpletuner.helpers.models.flux2 import spec as flux2
from simpletuner.helpers.models.flux2 import tiny as tiny_flux2
from simpletuner.helpers.models.sdxl import spec as sdxl
from simpletuner.helpers.models.sdxl import tiny as tiny_sdxl
from simpletuner.lycoris_defaults import default_lycoris_config
from tests.unit.adapters.attaching import attach

ALGORITHMS = tuple(RECORDS)
SMALLER = {
    "tlora": {"linear_dim": 8, "linear_alpha": 8.0, "tlora_min_rank": 4},
    "tlokr": {"linear_dim": 3, "linear_alpha": 3.0, "tlora_min_rank": 1},
}
"""What differs from an algorithm's default on models whose layers are 32 wide."""


def sdxl_inputs(model: Any) -> dict[str, Any]:
    pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    return {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 7, model.config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, pooled),
            "time_ids": torch.full((1, 6), 64.0),
        },
    }


def flux_inputs(model: FluxTransformer2DModel) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, model.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 6, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


@dataclass(frozen=True)
class Model:
    spec: ModelSpec
    make: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]

    def new(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        return self.make().requires_grad_(False).eval().to(dtype)

    def predict(self, model: Any, adapter: Adapter | None = None) -> Tensor:
        torch.manual_seed(1)
        inputs = self.inputs(model)
        own = {key: cast(value, model.dtype) for key, value in inputs.items()}
        if adapter is None:
            return model(**own, return_dict=False)[0]
        with adapter.rank_mask_for([500]):
            return model(**own, return_dict=False)[0]


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: cast(each, dtype) for key, each in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


MODELS = {
    "sdxl": Model(sdxl.SPEC, tiny_sdxl.make_unet, sdxl_inputs),
    "flux": Model(flux.SPEC, tiny_flux.make_transformer, flux_inputs),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_algorithm = pytest.mark.parametrize("algo", ALGORITHMS)


def lycoris(algo: str, **values: Any) -> dict[str, Any]:
    return default_lycoris_config(algo) | SMALLER.get(algo, {}) | values


def train(kind: Model, model: Any, adapter: Adapter) -> None:
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (kind.predict(model, adapter) - 1).square().mean().backward()
        optimizer.step()
    model.eval()


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, torch.device, bool]]:
    return {
        key: (parameter.detach().clone(), parameter.device, parameter.requires_grad)
        for key, parameter in model.named_parameters()
    }


@every_model
@every_algorithm
def test_default_of_an_algorithm_trains_and_reads_its_file_again(
    algo: str, model: Model, tmp_path: Path
) -> None:
    denoiser, config = model.new(), lycoris(algo)
    before, base = snapshot(denoiser), model.predict(denoiser)
    adapter = attach(denoiser, config, spec=model.spec)
    torch.testing.assert_close(model.predict(denoiser, adapter), base, rtol=0, atol=1e-5)
    train(model, denoiser, adapter)
    expected = model.predict(denoiser, adapter)
    assert (expected - base).abs().max() > 1e-3
    adapter.save(tmp_path / "a.safetensors", metadata={})

    adapter.set_strength(0.0)
    assert torch.equal(model.predict(denoiser, adapter), base)
    adapter.set_strength(1.0)
    assert torch.equal(model.predict(denoiser, adapter), expected)
    adapter.detach()
    after = snapshot(denoiser)
    assert after.keys() == before.keys()
    for key, (weight, *state) in before.items():
        assert torch.equal(after[key][0], weight), key
        assert list(after[key][1:]) == state, key
    assert torch.equal(model.predict(denoiser), base)

    fresh = model.new()
    loaded = load_adapter(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(model.predict(fresh, loaded), expected, rtol=0, atol=1e-5)
    again = model.new()
    started = attach(again, config, spec=model.spec, init_lora=tmp_path / "a.safetensors")
    torch.testing.assert_close(model.predict(again, started), expected, rtol=0, atol=1e-5)


@every_algorithm
def test_adapter_of_a_file_works_on_a_bf16_model_without_autocast(algo: str, tmp_path: Path) -> None:
    model = MODELS["sdxl"]
    adapter = attach(model.new(), lycoris(algo), spec=model.spec)
    adapter.save(tmp_path / "a.safetensors", metadata={})
    denoiser = model.new(torch.bfloat16)
    base = model.predict(denoiser)
    loaded = load_adapter(denoiser, tmp_path / "a.safetensors")
    found = model.predict(denoiser, loaded)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, base, rtol=0, atol=5e-2)


def test_full_keeps_the_models_own_weights_where_they_are_and_sees_bf16_differences() -> None:
    model = MODELS["sdxl"]
    denoiser = model.new(torch.bfloat16)
    keys = set(denoiser.state_dict())
    adapter = attach(denoiser, lycoris("full"), spec=model.spec)
    assert set(denoiser.state_dict()) == keys
    layer = adapter.network.loras[0]
    assert layer.weight.dtype == torch.float32
    assert layer.org_weight is layer.org_module[0].weight  # and no copy of it
    with torch.no_grad():
        layer.weight.add_(1e-6)  # lost in a sum with a bf16 weight
    x = torch.ones(1, layer.shape[1])
    linear = layer.org_module[0].float()
    torch.testing.assert_close(
        linear(x) - layer.org_forward(x),
        torch.full((1, layer.shape[0]), 1e-6 * layer.shape[1]),
        rtol=0.1,
        atol=0,
    )


def test_full_drops_whole_outputs_and_whole_layers_while_training_only() -> None:
    linear = nn.Linear(4, 1000, bias=False).requires_grad_(False)
    for options in ({"rank_dropout": 0.25}, {"module_dropout": 1.0}):
        layer = FullLayer("x", linear, 1.0, 1, 1.0, **options)
        with torch.no_grad():
            layer.weight.fill_(1.0)
        for is_training, expected in ((True, 0.75 if "rank_dropout" in options else 0.0), (False, 1.0)):
            layer.train(is_training)
            added = (layer(torch.ones(1, 4)) - linear(torch.ones(1, 4))).round().flatten()
            assert set(added.tolist()) <= {0.0, 4.0}
            assert (added > 0).float().mean() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("block", [0, 1])
def test_dylora_trains_one_block_at_the_scale_of_its_ranks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DyLoraLayer("x", nn.Linear(4, 4), 1.0, 4, 8.0, block_size=2)
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(block))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    delta, _ = layer.get_diff_weight()
    rank = 2 * (block + 1)
    assert torch.equal(
        delta, torch.full((4, 4), rank * 8.0 / rank)
    )  # a sum over the ranks, times alpha / rank
    delta.sum().backward()
    assert [factor.grad is not None for factor in layer.up_list] == [block == 0, block == 1]


def test_dylora_computes_the_same_again_under_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model = MODELS["sdxl"]
        denoiser = model.new()
        adapter = attach(denoiser, lycoris("dylora"), spec=model.spec)
        denoiser.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
        model.predict(denoiser, adapter).square().mean().backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


BOFT_REMEDY = r"linear_dim to 18\b"
PATTERN = {"name_algo_map": {".*to_qkv_mlp_proj": {"algo": "boft", "dim": 16}}}
BOTH = {"target_module": ["Attention", "FeedForward"]}


@pytest.mark.parametrize(
    ("algo", "values", "message"),
    [
        (
            "boft",
            {},
            r"algo boft\b.*linear_dim 10\b.*\b288x32\b.*single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj\b"
            rf".*\b288\b.*{BOFT_REMEDY}",
        ),
        ("boft", {"linear_dim": 17}, BOFT_REMEDY),
        (
            "lora",
            {"apply_preset": BOTH | PATTERN},
            r"algo boft\b.*linear_dim 16\b.*" + BOFT_REMEDY,
        ),
        (
            "dylora",
            {"linear_dim": 6},
            r"algo dylora\b.*linear_dim 6\b.*block_size",
        ),
        (
            "full",
            {"bypass_mode": True},
            r"algo full\b.*bypass mode",
        ),
        ("tlora", {"linear_dim": 64}, "rank 64.*32x32"),
    ],
)
def test_what_cannot_be_made_for_a_layer_is_refused_with_the_reason_and_a_remedy(
    algo: str, values: dict[str, Any], message: str
) -> None:
    model = tiny_flux2.make_transformer(guidance_embeds=True).requires_grad_(False)
    with pytest.raises(ConfigError, match=message):
        attach(model, lycoris(algo, **values), spec=flux2.SPEC)
    assert not any("lycoris" in name for name, _ in model.named_modules())


def test_boft_that_no_rank_fits_promises_none() -> None:
    model = nn.ModuleDict({"odd": nn.Linear(8, 7), "even": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match=r"7x8.*\bodd\b(?!.*linear_dim to)"):
        attach(model, lycoris("boft", apply_preset={"target_module": ["Linear"]}))


def test_lycoris_itself_creates_and_reads_with_our_layers() -> None:
    created, read = lycoris_wrapper.network_module_dict.values(), lycoris_modules.MODULE_LIST
    for layers, missing in ((created, {NormLayer}), (read, set())):  # train_norm makes it, no algo names it
        assert set(REPLACED.values()) - missing <= set(layers)
        assert not set(REPLACED) & set(layers)

"""Attaching, training, saving and reloading adapters on a real SDXL UNet of toy size."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from lycoris.modules.tlora import get_timestep_mask
from lycoris.wrapper import LycorisNetwork
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import LycorisAdapter, attach_adapter, load_adapter
from simpletuner.helpers.adapters.peft_lora import PeftAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.spec import INITS
from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.loading.lycoris_file import read_lycoris
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.contracts import TargetAlias
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.sdxl.tiny import make_unet
from tests.unit.adapters.attaching import TLORA, attach, lycoris_config

LYCORIS = AdapterConfig(lora_type="lycoris")


def unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return make_unet().requires_grad_(False).eval()


def inputs(model: UNet2DConditionModel, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    width = model.config.cross_attention_dim
    pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, width, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, generator=generator),
            "time_ids": torch.full((batch, 6), 64.0),
        },
    }


def predict(model: UNet2DConditionModel, adapter: Adapter | None, *timesteps: int) -> Tensor:
    with adapter.rank_mask_for(timesteps) if adapter else nullcontext():
        return model(timestep=torch.tensor(timesteps), **inputs(model, len(timesteps)), return_dict=False)[0]


def train(model: UNet2DConditionModel, adapter: Adapter, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for step in range(steps):
        with adapter.rank_mask_for([100, 800 - step]):
            out = model(timestep=torch.tensor([100, 800 - step]), **inputs(model), return_dict=False)[0]
            (out - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("sig_type", ["last", "middle", "principal"])
@pytest.mark.reliability_row(11)
def test_trained_tlora_reloads_to_equal_output_and_an_identical_second_file(
    init: str, sig_type: str, tmp_path: Path
) -> None:
    model = unet()
    adapter = attach(model, TLORA | {"tlora_init": init, "sig_type": sig_type})
    train(model, adapter)
    adapter.save(tmp_path / "a.safetensors", metadata={"base_model": "tiny"})
    fresh = unet()
    loaded = load_adapter(fresh, tmp_path / "a.safetensors")
    assert loaded.num_layers == adapter.num_layers
    assert loaded.tlora_config == adapter.tlora_config
    base = predict(unet(), None, 900, 10)
    for timesteps in ((0, 0), (500, 1000), (900, 10)):
        found, expected = predict(fresh, loaded, *timesteps), predict(model, adapter, *timesteps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - base).abs().max() > 1e-3, "two steps changed nothing"
    loaded.save(tmp_path / "b.safetensors", metadata={"base_model": "tiny"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "lycoris",
    [
        {"algo": "lora", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2.0},
        {"algo": "loha", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2.0},
        {"algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2.0, "factor": 4},
    ],
    ids=lambda value: value["algo"],
)
def test_lycoris_algorithm_trains_saves_and_reloads_to_equal_output(
    lycoris: dict[str, Any], tmp_path: Path
) -> None:
    model = unet()
    base = predict(model, None, 500, 10)
    adapter = attach(model, lycoris)
    assert adapter.tlora_config is None
    torch.testing.assert_close(predict(model, adapter, 500, 10), base, rtol=0, atol=1e-6)
    train(model, adapter)
    expected = predict(model, adapter, 500, 10)
    assert (expected - base).abs().max() > 1e-3
    adapter.save(tmp_path / "a.safetensors", metadata={})
    fresh = unet()
    loaded = load_adapter(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(predict(fresh, loaded, 500, 10), expected, rtol=0, atol=1e-6)
    adapter.detach()
    assert torch.equal(predict(model, None, 500, 10), base)
    assert set(model.state_dict()) == set(unet().state_dict())


def test_denoiser_of_which_a_part_is_on_meta_is_refused(tmp_path: Path) -> None:
    attach(unet(), TLORA).save(tmp_path / "a.safetensors", metadata={})
    model = unet()
    model.conv_out.to("meta")
    with pytest.raises(AdapterError, match="on meta"):
        load_adapter(model, tmp_path / "a.safetensors")


def test_peft_target_that_matches_nothing_is_refused_beside_one_that_does() -> None:
    with pytest.raises(ConfigError, match="peft_lora_target_modules: nothing"):
        attach(unet(), peft_lora_target_modules="to_q,nothing")


def pipeline_around(model: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """A stock pipeline that holds nothing else."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return StableDiffusionXLPipeline(unet=model, **dict.fromkeys(names))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_lora_that_starts_from_the_base_weights_fits_the_published_base(
    tmp_path: Path, start: str
) -> None:
    model = unet()
    base = predict(model, None, 500, 10)
    adapter = attach(model, lora_rank=4, lora_alpha=1.5, lora_init_type=start)
    train(model, adapter)
    expected = predict(model, adapter, 500, 10)
    adapter.save(tmp_path / "pytorch_lora_weights.safetensors", metadata={"base_model": "tiny"})
    pipeline = pipeline_around(unet())
    pipeline.load_lora_weights(tmp_path)
    effect = (expected - base).abs().max()
    assert effect > 1e-3
    found = predict(pipeline.unet, None, 500, 10)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-3 * effect))


def test_peft_lora_is_loaded_by_stock_diffusers_at_its_own_strength(tmp_path: Path) -> None:
    model = unet()
    base = predict(model, None, 500, 10)
    adapter = attach(model, lora_rank=4, lora_alpha=1.5)
    assert isinstance(adapter, PeftAdapter)
    train(model, adapter)
    expected = predict(model, adapter, 500, 10)
    assert (expected - base).abs().max() > 1e-3
    adapter.save(tmp_path / "pytorch_lora_weights.safetensors", metadata={"base_model": "tiny"})
    pipeline = pipeline_around(unet())
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(pipeline.unet, None, 500, 10), expected, rtol=0, atol=1e-6)
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    adapter.detach()
    assert torch.equal(predict(model, None, 500, 10), base)
    again = attach(model, lora_rank=4, lora_alpha=1.5)
    again.load_state_dict(state)
    torch.testing.assert_close(predict(model, again, 500, 10), expected, rtol=0, atol=0)


def test_peft_lora_counts_its_own_layers_on_a_model_that_had_another() -> None:
    model = unet()
    first = attach(model, lora_rank=4, peft_lora_target_modules=("to_q", "to_k", "to_v"))
    first.detach()
    second = attach(model, lora_rank=4, peft_lora_target_modules=("to_q",))
    assert isinstance(second, PeftAdapter)
    assert second.num_layers == len(second.layers) == first.num_layers // 3
    assert len(second.parameters()) == 2 * second.num_layers


def test_new_tlora_adapter_changes_nothing_at_any_timestep() -> None:
    model = unet()
    base = [predict(model, None, t, t) for t in (0, 500, 999)]
    for init in INITS:
        adapter = attach(model, TLORA | {"tlora_init": init})
        for timestep, expected in zip((0, 500, 999), base, strict=True):
            assert torch.equal(predict(model, adapter, timestep, timestep), expected)
        adapter.detach()


def test_batch_equals_single_runs_through_the_whole_unet() -> None:
    model = unet()
    adapter = attach(model, TLORA)
    train(model, adapter)
    timesteps = (50, 950)
    batch = predict(model, adapter, *timesteps)
    values = inputs(model)
    for i, timestep in enumerate(timesteps):
        with adapter.rank_mask_for([timestep]):
            single = model(
                values["sample"][i : i + 1],
                torch.tensor([timestep]),
                values["encoder_hidden_states"][i : i + 1],
                added_cond_kwargs={
                    key: value[i : i + 1] for key, value in values["added_cond_kwargs"].items()
                },
                return_dict=False,
            )[0]
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=5e-6)


def test_file_states_schedule_base_and_configuration(tmp_path: Path) -> None:
    model = unet()
    config = TLORA | {"tlora_schedule": "inclusive", "tlora_alpha": 0.7}
    attach(model, config).save(tmp_path / "a.safetensors", metadata={"base_model": "tiny", "trigger": "sks"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["tlora_config"]) == {
        "max_rank": 8,
        "min_rank": 2,
        "alpha": 0.7,
        "schedule": "inclusive",
        "num_timesteps": 1000,
    }
    assert json.loads(metadata["lycoris_config"]) == config
    assert (metadata["base_model"], metadata["trigger"]) == ("tiny", "sks")
    tensors = load_file(tmp_path / "a.safetensors")
    assert set(json.loads(metadata["base_weights_hash"])) == {key.split(".")[0] for key in tensors}
    paths = json.loads(metadata["module_paths"])
    modules = dict(model.named_modules())
    assert all(
        f"lycoris_{path.replace('.', '_')}" == name and path in modules for name, path in paths.items()
    )


def test_another_base_is_warned_of_and_the_same_base_in_bf16_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attach(unet(), TLORA).save(tmp_path / "a.safetensors", metadata={"base_model": "tiny"})
    with caplog.at_level(logging.WARNING):
        load_adapter(unet().to(torch.bfloat16), tmp_path / "a.safetensors")
    assert "a.safetensors" not in caplog.text
    other = unet()
    with torch.no_grad():
        next(module for module in other.modules() if type(module).__name__ == "Attention").to_q.weight.add_(
            0.1
        )
    with caplog.at_level(logging.WARNING):
        load_adapter(other, tmp_path / "a.safetensors")
    assert "(tiny)" in caplog.text
    assert " 1 of " in caplog.text


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"target_module": ["Atention"]}, r"\bAtention\b.*\bAttention\b"),
        ({"target_module": ["Attention", "FluxAttention"]}, "apply_preset: FluxAttention"),
        ({"target_name": ["nothing.*"]}, r"apply_preset: nothing\.\*"),
    ],
)
def test_target_that_matches_nothing_lists_the_models_classes(preset: dict[str, Any], message: str) -> None:
    model = unet()
    with pytest.raises(ConfigError, match=message) as caught:
        attach(model, TLORA | {"apply_preset": preset})
    assert "Attention (" in str(caught.value)
    assert not any(isinstance(module, TLoraLayer) for module in model.modules())


def test_generic_targets_mean_what_the_family_says() -> None:
    spec = SPEC.__class__(
        **{name: getattr(SPEC, name) for name in SPEC.__slots__ if name != "target_aliases"},
        target_aliases={
            "FeedForward": TargetAlias(modules=("Attention",), names=(r"time_embedding\.linear_\d+$",))
        },
    )
    config = lycoris_config(TLORA | {"apply_preset": {"target_module": ["FeedForward"]}})
    adapter = attach_adapter(unet(), LYCORIS, lycoris=config, spec=spec, seed=0)
    names = [layer.lora_name for layer in adapter.lycoris_network.loras]
    assert sum("time_embedding_linear" in name for name in names) == 2
    assert all("attn" in name or "time_embedding" in name for name in names)


def test_preset_of_one_network_does_not_leak_into_the_next() -> None:
    before = dict(vars(LycorisNetwork))
    attach(unet(), TLORA | {"apply_preset": {"target_module": ["Attention"], "exclude_name": [".*to_v"]}})
    assert dict(vars(LycorisNetwork)) == before
    names = [layer.lora_name for layer in attach(unet(), TLORA).lycoris_network.loras]
    assert any(name.endswith("to_v") for name in names)


def test_layers_of_another_rank_follow_the_schedule_with_their_own_maximum() -> None:
    model = unet()
    options = {
        "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"FeedForward": {"dim": 4}}}
    }
    adapter = attach(model, TLORA | options | {"tlora_min_rank": 6})
    ranks = {layer.lora_dim for layer in adapter.lycoris_network.loras}
    assert ranks == {4, 8}
    train(model, adapter)
    with adapter.rank_mask_for([1000]):
        assert mask.current_mask(adapter.group, 8).sum() == 6
        assert mask.current_mask(adapter.group, 4).sum() == 4


def test_tlora_in_module_algo_map_of_another_algorithm_is_masked_too() -> None:
    options = {"algo": "lokr", "factor": 4, "apply_preset": {"target_module": ["FeedForward"]}}
    options["apply_preset"]["module_algo_map"] = {"Attention": {"algo": "tlora"}}
    model = unet()
    adapter = attach(model, TLORA | options)
    kinds = {type(layer).__name__ for layer in adapter.lycoris_network.loras}
    assert kinds == {"TLoraLayer", "LokrLayer"}
    assert adapter.tlora_config is not None
    train(model, adapter)


def test_fractional_alpha_and_multiplier_stay_fractions() -> None:
    adapter = attach(unet(), TLORA | {"linear_alpha": 0.5, "multiplier": 0.5})
    layer = adapter.lycoris_network.loras[0]
    assert (layer.scale, layer.multiplier, float(layer.alpha)) == (0.5 / 8, 0.5, 0.5)


def test_training_state_restores_differences_exactly() -> None:
    model = unet()
    adapter = attach(model, TLORA)
    train(model, adapter)
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    expected = predict(model, adapter, 300, 700)
    other = unet()
    again = attach(other, TLORA)
    again.load_state_dict(state)
    assert torch.equal(predict(other, again, 300, 700), expected)
    missing = next(iter(state))
    state.pop(missing)
    with pytest.raises(AdapterError, match=re.escape(missing)):
        again.load_state_dict(state)


def test_init_lora_starts_at_the_adapter_of_a_file(tmp_path: Path) -> None:
    model = unet()
    adapter = attach(model, TLORA)
    train(model, adapter)
    adapter.save(tmp_path / "a.safetensors", metadata={})
    config = AdapterConfig.model_construct(**(dict(LYCORIS) | {"init_lora": tmp_path / "a.safetensors"}))
    other = unet()
    again = attach_adapter(other, config, lycoris=lycoris_config(TLORA), spec=SPEC, seed=99)
    torch.testing.assert_close(
        predict(other, again, 300, 700), predict(model, adapter, 300, 700), rtol=0, atol=1e-6
    )
    smaller = lycoris_config(TLORA | {"linear_dim": 4})
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        attach_adapter(unet(), config, lycoris=smaller, spec=SPEC, seed=99)


def with_init_lora(file: Path, **values: Any) -> AdapterConfig:
    return AdapterConfig.model_construct(**(dict(AdapterConfig(**values)) | {"init_lora": file}))


def test_init_lora_of_a_stock_file_takes_the_weight_as_its_base(tmp_path: Path) -> None:
    attach(unet(), TLORA | {"tlora_init": "weight", "sig_type": "principal"}).save(
        tmp_path / "a.safetensors", metadata={}
    )
    stock = {
        key: value
        for key, value in load_file(tmp_path / "a.safetensors").items()
        if "base_" not in key and "tlora_schedule" not in key
    }
    save_file(stock, tmp_path / "stock.safetensors")
    model, config = unet(), with_init_lora(tmp_path / "stock.safetensors", lora_type="lycoris")
    base = predict(model, None, 300, 700)
    adapter = attach_adapter(model, config, lycoris=lycoris_config(TLORA), spec=SPEC, seed=3)
    torch.testing.assert_close(predict(model, adapter, 300, 700), base, rtol=0, atol=1e-6)


def test_init_lora_of_rank_one_is_not_spread_over_all_ranks(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    attach(unet(), TLORA | {"linear_dim": 1, "tlora_min_rank": 1, "linear_alpha": 4.0}).save(
        file, metadata={}
    )
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        attach_adapter(
            unet(),
            with_init_lora(file, lora_type="lycoris"),
            lycoris=lycoris_config(TLORA),
            spec=SPEC,
            seed=3,
        )


def test_header_that_states_another_rank_than_the_layers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    attach(unet(), TLORA).save(file, metadata={})
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    metadata["tlora_config"] = json.dumps({"max_rank": 64})
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(AdapterError, match=r"'max_rank': 64.*'max_rank': 8"):
        load_adapter(unet(), file)


@pytest.mark.parametrize("key", ["tlora_config", "lycoris_config", "base_weights_hash"])
def test_header_entry_that_is_not_json_is_named(key: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    attach(unet(), TLORA).save(file, metadata={})
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata | {key: "{"})
    with pytest.raises(AdapterError, match=key):
        load_adapter(unet(), file)


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_standard_lora_loads_as_what_it_was_trained(keys: dict[str, bool], tmp_path: Path) -> None:
    trained, x = unet(), torch.randn(2, 5, 32)
    adapter = attach(trained, lora_rank=4, lora_alpha=8, **keys)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    adapter.save(tmp_path / "a.safetensors", metadata={})
    model = unet()
    load_adapter(model, tmp_path / "a.safetensors")
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.no_grad():
        base, expected = unet().get_submodule(path)(x), trained.get_submodule(path)(x)
        error = (model.get_submodule(path)(x) - expected).norm() / (expected - base).norm()
    assert error < 1e-4


def test_second_network_leaves_the_layers_of_the_first_alone() -> None:
    model = unet()
    first = attach(model, {"algo": "lora", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4.0})
    second = attach(model, TLORA)
    assert second.num_layers == first.num_layers


def test_strength_scales_the_effect_and_zero_is_the_base() -> None:
    model = unet()
    base = predict(model, None, 500, 500)
    adapter = attach(model, TLORA)
    train(model, adapter)
    adapter.set_strength(0.0)
    assert torch.equal(predict(model, adapter, 500, 500), base)
    adapter.set_strength(1.0)
    full = (predict(model, adapter, 500, 500) - base).norm()
    adapter.set_strength(0.1)
    assert 0 < (predict(model, adapter, 500, 500) - base).norm() < full / 2


@pytest.mark.parametrize("spoil", ["truncated", "empty", "not finite", "foreign", "other model", "missing"])
@pytest.mark.reliability_row(23)
def test_unusable_file_is_refused_and_nothing_is_attached(spoil: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    attach(unet(), TLORA).save(file, metadata={})
    tensors = load_file(file)
    if spoil == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif spoil == "empty":
        save_file({}, file)
    elif spoil == "not finite":
        key = next(key for key in tensors if "q_layer" in key)
        tensors[key][0, 0] = float("nan")
        save_file(tensors, file)
    elif spoil == "foreign":
        save_file({"unet.x.lora_A.weight": torch.zeros(4, 4)}, file)
    elif spoil == "other model":
        save_file({key.replace("lycoris_", "lycoris_other_"): value for key, value in tensors.items()}, file)
    else:
        file.unlink()
    model = unet()
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, file)
    assert str(file) in str(caught.value)
    assert not any(isinstance(module, TLoraLayer) for module in model.modules())


def test_writing_a_value_that_is_not_finite_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"\bx\b"):
        adapter_file.write(tmp_path / "a.safetensors", {"x": torch.tensor([float("inf")])}, metadata={})
    assert not list(tmp_path.iterdir())


def test_two_networks_with_different_schedules_live_on_one_model() -> None:
    model = unet()
    base = predict(model, None, 500, 500)
    first, second = attach(model, TLORA), attach(model, TLORA | {"linear_dim": 4, "tlora_min_rank": 1})
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=0.02)
    with first.rank_mask_for([500]), second.rank_mask_for([500]):
        both = model(timestep=torch.tensor(500), **inputs(model), return_dict=False)[0]
        assert mask.current_mask(first.group, 8).sum() == 5
        assert mask.current_mask(second.group, 4).sum() == 2
    second.detach()
    assert torch.equal(predict(model, first, 500, 500), both)
    first.detach()
    assert torch.equal(predict(model, None, 500, 500), base)


def test_real_sdxl_wraps_700_layers_on_meta() -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=128,
            cross_attention_dim=2048,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).requires_grad_(False)
    options = {
        "linear_dim": 64,
        "linear_alpha": 64,
        "apply_preset": {"target_module": ["Attention", "FeedForward"]},
    }
    adapter = attach(model, TLORA | options)
    assert isinstance(adapter, LycorisAdapter)
    assert adapter.num_layers == 700
    assert sum(p.numel() for p in adapter.parameters()) == 167_489_280


@pytest.mark.parametrize("sig_type", ["last", "middle", "principal"])
@pytest.mark.parametrize("use_data_init", [True, False])
def test_what_the_json_says_of_the_start_and_the_group_arrives_at_every_layer(
    sig_type: str, use_data_init: bool, tmp_path: Path
) -> None:
    written = TLORA | {"sig_type": sig_type, "use_data_init": use_data_init, "mask_group_id": 3}
    (tmp_path / "lycoris.json").write_text(json.dumps(written))
    problems = Problems()
    place = Source(problems, lambda _: "lycoris.json", PathContext())
    config = read_lycoris(json.loads((tmp_path / "lycoris.json").read_text()), place, raw=written)
    problems.raise_if_any()
    assert config is not None
    adapter = attach_adapter(unet(), AdapterConfig(lora_type="lycoris"), lycoris=config, spec=SPEC, seed=0)
    assert isinstance(adapter, LycorisAdapter)
    init = "weight" if use_data_init else "random"
    for layer in adapter.network.loras:
        assert (layer.spec.init, layer.spec.sig_type, layer.mask_group_id) == (
            init,
            sig_type,
            3,
        )
    with adapter.rank_mask_for([500]):
        assert get_timestep_mask(3) is not None

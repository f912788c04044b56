"""Which layers a lycoris json adapts and with what, on the real models of toy size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux import tiny as tiny_flux
from simpletuner.helpers.models.flux2 import spec as flux2
from simpletuner.helpers.models.flux2 import tiny as tiny_flux2
from simpletuner.helpers.models.sdxl import spec as sdxl
from simpletuner.helpers.models.sdxl import tiny as tiny_sdxl
from tests.unit.adapters.attaching import attach

Chosen = tuple[str, int]
"""Algorithm of a layer and its rank."""
MODELS: Mapping[str, tuple[ModelSpec, Callable[[], Any]]] = {
    "sdxl": (sdxl.SPEC, tiny_sdxl.make_unet),
    "flux": (flux.SPEC, tiny_flux.make_transformer),
    "flux2": (flux2.SPEC, lambda: tiny_flux2.make_transformer(guidance_embeds=True)),
}
KINDS = {"TLoraLayer": "tlora", "LoConLayer": "lora", "LohaLayer": "loha", "FullLayer": "full"}
BOTH = {"target_module": ["Attention", "FeedForward"]}
ATTENTION = {"target_module": ["Attention"]}
every_family = pytest.mark.parametrize("family", MODELS)


def make(family: str) -> Any:
    torch.manual_seed(0)
    return MODELS[family][1]().requires_grad_(False).eval()


def adapted(family: str, preset: Mapping[str, Any], model: Any = None, **values: Any) -> LycorisAdapter:
    """A T-LoRA of rank 4 on a family's tiny model."""
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4.0, **values}
    model = make(family) if model is None else model
    return attach(model, values | {"apply_preset": preset}, spec=MODELS[family][0])


def chosen(adapter: LycorisAdapter) -> dict[str, Chosen]:
    """Path of each adapted layer -> its algorithm and rank."""
    return {
        adapter._paths[layer.lora_name]: (KINDS[type(layer).__name__], layer.lora_dim)
        for layer in adapter.network.loras
    }


@every_family
@pytest.mark.parametrize("preset", [BOTH, {"target_module": []}], ids=["named", "default"])
@pytest.mark.parametrize(("pattern", "is_glob"), [(r".*\.to_q$", False), ("*.to_q", True)])
def test_name_pattern_decides_for_its_layers_inside_a_target_class(
    family: str, preset: dict[str, Any], pattern: str, is_glob: bool
) -> None:
    plain = chosen(adapted(family, preset))
    own = {"name_algo_map": {pattern: {"dim": 2}}, "use_fnmatch": is_glob} | BOTH
    found = chosen(adapted(family, own))
    assert found == {path: ("tlora", 2 if path.endswith(".to_q") else 4) for path in plain}
    assert {rank for _, rank in found.values()} == {2, 4}


@every_family
def test_name_pattern_gives_its_layers_another_algorithm(family: str) -> None:
    preset = BOTH | {"name_algo_map": {".*to_k$": {"algo": "loha", "dim": 3}, ".*to_out": {"algo": "lora"}}}
    for path, found in chosen(adapted(family, preset)).items():
        expected = ("loha", 3) if path.endswith("to_k") else ("lora", 4) if "to_out" in path else ("tlora", 4)
        assert found == expected, path


@every_family
def test_layers_come_in_the_models_order_whatever_names_them(family: str) -> None:
    model = make(family)
    maps = {"name_algo_map": {".*to_v$": {"dim": 2}}, "module_algo_map": {"FeedForward": {"dim": 3}}}
    found = list(chosen(adapted(family, ATTENTION | maps, model)))
    assert found == [path for path, _ in model.named_modules() if path in found]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        # What stands in name_algo_map beats every class, and is adapted where no class is.
        (ATTENTION | {"name_algo_map": {"time_embedding": {"dim": 2}}}, {"time_embedding.linear_1": 2}),
        (
            {"module_algo_map": {"Attention": {"dim": 3}}, "name_algo_map": {".*to_q": {"dim": 2}}},
            {"attn1.to_q": 2, "attn1.to_k": 3, "attn2.to_out.0": 3},
        ),
        # The first pattern of several; a whole path before every pattern.
        (
            ATTENTION | {"name_algo_map": {".*attn2.to_q": {"dim": 2}, ".*to_q": {"dim": 3}}},
            {"attn1.to_q": 3, "attn2.to_q": 2, "attn2.to_k": 4},
        ),
        (
            ATTENTION
            | {
                "name_algo_map": {
                    ".*to_q": {"dim": 3},
                    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": {"dim": 2},
                }
            },
            {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2, "attn2.to_q": 3, "to_v": 4},
        ),
        # The innermost of several classes; the adapter's own where only target_module names the class.
        (
            {"module_algo_map": {"BasicTransformerBlock": {"dim": 2}, "Attention": {"dim": 3}}},
            {"attn1.to_q": 3, "ff.net.2": 2},
        ),
        (
            {
                "target_module": ["BasicTransformerBlock", "Transformer2DModel"],
                "module_algo_map": {"FeedForward": {"dim": 2}},
            },
            {"attn1.to_q": 4, "ff.net.2": 2, "proj_in": 4},
        ),
        (
            {"target_module": ["Attention"], "module_algo_map": {"BasicTransformerBlock": {"dim": 2}}},
            {"attn1.to_q": 2, "ff.net.2": 2},
        ),
    ],
)
def test_precedence_is_name_then_innermost_class_then_the_adapters_own(
    preset: dict[str, Any], expected: dict[str, int]
) -> None:
    found = chosen(adapted("sdxl", preset))
    for ending, rank in expected.items():
        longer = [other for other in expected if other != ending and other.endswith(ending)]
        layers = [p for p in found if p.endswith(ending) and not any(p.endswith(each) for each in longer)]
        assert layers
        assert {found[path] for path in layers} == {("tlora", rank)}, ending


def test_generic_class_in_a_map_means_the_familys_layers_and_names_still_beat_it() -> None:
    preset = {
        "target_module": ["Attention"],
        "module_algo_map": {"FeedForward": {"dim": 2}, "FluxSingleTransformerBlock": {"dim": 3}},
        "name_algo_map": {r"single_transformer_blocks\.0\.proj_mlp": {"dim": 1}},
    }
    found = {path: rank for path, (_, rank) in chosen(adapted("flux", preset)).items()}
    assert found["single_transformer_blocks.0.proj_mlp"] == 1
    assert found["single_transformer_blocks.1.proj_mlp"] == 2
    assert found["single_transformer_blocks.0.proj_out"] == 2
    assert found["single_transformer_blocks.0.attn.to_q"] == 3
    assert found["transformer_blocks.0.attn.to_q"] == 4
    assert found["transformer_blocks.0.ff.net.2"] == 2


@pytest.mark.parametrize(("block", "is_glob"), [(r".*\.attn2$", False), ("*.attn2", True)])
def test_excluded_block_keeps_its_layers_whatever_names_them(block: str, is_glob: bool) -> None:
    pattern = "*.to_q" if is_glob else ".*to_q"
    maps = {"name_algo_map": {pattern: {"dim": 2}}, "exclude_name": [block], "use_fnmatch": is_glob}
    found = chosen(adapted("sdxl", {"target_module": ["BasicTransformerBlock"]} | maps))
    assert not [path for path in found if ".attn2." in path]
    assert {found[path][1] for path in found if path.endswith("attn1.to_q")} == {2}
    assert any("ff.net" in path for path in found)


def test_file_name_pattern_that_matches_a_whole_block_reaches_its_layers() -> None:
    maps = {"name_algo_map": {"*attn1*": {"dim": 2}}, "use_fnmatch": True}
    found = chosen(adapted("sdxl", BOTH | maps))
    assert {rank for path, (_, rank) in found.items() if "attn1" in path} == {2}
    assert {rank for path, (_, rank) in found.items() if "attn1" not in path} == {4}
    assert found.keys() == chosen(adapted("sdxl", BOTH)).keys()


def test_layer_whose_name_begins_like_another_is_not_taken_with_it() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "to_q", "to_q2", "xto_q", "toxq")})
    assert list(chosen(adapted("sdxl", {"target_name": ["to_q$"]}, model))) == ["to_q"]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"name_algo_map": {"nothing": {"dim": 2}}}, r"\bnothing\b"),
        ({"module_algo_map": {"Atention": {"dim": 2}}}, r"\bAtention\b.*\bAttention\b"),
        (BOTH | {"exclude_name": [".*"]}, "Attention, FeedForward"),
        (BOTH | {"name_algo_map": {".*attn1$": {"dim": 2}}}, r"attn1\$"),
        (BOTH | {"exclude_name": [".*ff"]}, r"apply_preset: FeedForward\b"),
        (
            BOTH | {"name_algo_map": {".*to_q": {"dim": 2}, ".*attn1.to_q": {"dim": 3}}},
            r"name_algo_map: \.\*attn1\.to_q\b",
        ),
        (BOTH | {"exclude_name": ["attn2"]}, r"exclude_name: attn2\b.*start of the path.*\s\.\*attn2\b"),
        (BOTH | {"exclude_name": ["attn1|attn2"]}, r"exclude_name: .*\.\*\(\?:attn1\|attn2\)"),
        (BOTH | {"exclude_name": [".*attn1", "attn3"]}, r"exclude_name: attn3 (?!.*start of the path)"),
        (BOTH | {"exclude_name": ["attn2"], "use_fnmatch": True}, r"exclude_name: attn2\b.*\s\*attn2\*"),
        ({"target_name": ["attn2.to_q"]}, r"attn2\.to_q\b.*start of the path.*\s\.\*attn2\.to_q\b"),
        (
            {
                "module_algo_map": {
                    name: {"dim": 2} for name in ("BasicTransformerBlock", "Attention", "FeedForward")
                }
            },
            r"module_algo_map: BasicTransformerBlock\b",
        ),
        (
            BOTH | {"module_algo_map": {"Attention": {"dim": 2}}, "name_algo_map": {".*attn": {"dim": 3}}},
            r"module_algo_map: Attention\b",
        ),
    ],
)
def test_name_that_decides_for_nothing_is_refused(preset: dict[str, Any], message: str) -> None:
    model = make("sdxl")
    with pytest.raises(ConfigError, match=message):
        adapted("sdxl", preset, model)
    assert not any("lycoris" in name for name, _ in model.named_modules())


@every_family
def test_tlora_layers_of_a_pattern_open_their_own_share_of_the_ranks(family: str, tmp_path: Path) -> None:
    model = make(family)
    adapter = adapted(family, BOTH | {"name_algo_map": {r".*\.to_q$": {"dim": 2}}}, model, tlora_min_rank=1)
    with adapter.rank_mask_for([500]):  # int(0.5 * (R - 1)) + 1
        active = {
            rank: int(found.sum())
            for rank in (2, 4)
            if (found := mask.current_mask(adapter.group, rank)) is not None
        }
        for layer in adapter.network.loras:
            current = layer._group.current(layer.ranks)
            rank_mask, shared, gain = layer._active_ranks(current, torch.zeros(1, layer.shape[1]))
            assert (rank_mask, shared, gain) == (None, active[layer.lora_dim], 1.0)
    assert active == {2: 1, 4: 2}
    adapter.save(tmp_path / "a.safetensors", metadata={})
    again = load_adapter(make(family), tmp_path / "a.safetensors")
    assert chosen(again) == chosen(adapter)
    assert again.schedule == adapter.schedule

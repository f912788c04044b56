"""Layers that a layout joins to one: whose rows are where, and at which scale."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import Tensor, nn

from simpletuner.helpers.adapters.files.layouts import (
    Layout,
    header_of,
    make_key_map,
    shares_alpha,
    tensors_of,
)
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.contracts import FusedSlice, ModelSpec
from simpletuner.helpers.errors import AdapterError

ROWS = {
    "q": FusedSlice("block.0.joined", (0,), 4),
    "k": FusedSlice("block.0.joined", (1,), 4),
    "wide": FusedSlice("block.0.joined", (2, 3), 4),
    "turned": FusedSlice("block.0.mod", (1, 0), 2),
}


def original_name(path: str) -> str | FusedSlice:
    if path == "lost":
        raise ValueError("lost is not a layer of the toy")
    return ROWS.get(path, f"alone.{path}")


SPEC = ModelSpec(
    name="toy",
    flavours={},
    default_flavour="",
    prediction_types=("epsilon",),
    pixel_alignment=8,
    minimum_alignment=8,
    default_resolution=64,
    lora_targets=(),
    denoiser_name="transformer",
    original_name=original_name,
)


def layer(path: str, up: list[list[float]], down: list[list[float]], *, scale: float = 1.0) -> LoraLayer:
    tensors = torch.tensor(down), torch.tensor(up)
    return LoraLayer(path, tensors[0], tensors[1], alpha=scale * len(down), error=0.0)


def written(*layers: LoraLayer) -> dict[str, Tensor]:
    return tensors_of(layers, "kohya", make_key_map([each.path for each in layers], "kohya", SPEC))


def test_parts_lie_in_their_rows_whatever_their_order_and_ranks() -> None:
    wide = layer("wide", [[5.0], [6.0]], [[0.0, 7.0]], scale=0.5)
    q = layer("q", [[1.0, 2.0]], [[1.0, 0.0], [3.0, 4.0]], scale=0.5)
    tensors = written(wide, q)
    assert list(tensors) == [
        "lora_unet_block_0_joined.lora_down.weight",
        "lora_unet_block_0_joined.lora_up.weight",
        "lora_unet_block_0_joined.alpha",
    ]
    down, up, alpha = tensors.values()
    assert down.tolist() == [[0.0, 7.0], [1.0, 0.0], [3.0, 4.0]]
    assert up.tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [6.0, 0.0, 0.0]]
    assert float(alpha) == 3 * 0.5, "rank times the scale of every part"


def test_rows_that_the_original_has_in_another_order_are_moved() -> None:
    tensors = written(layer("turned", [[1.0], [2.0], [3.0], [4.0]], [[1.0]]))
    assert tensors["lora_unet_block_0_mod.lora_up.weight"].flatten().tolist() == [3.0, 4.0, 1.0, 2.0]


def test_a_layer_of_its_own_is_written_as_it_is() -> None:
    alone = layer("one", [[1.0]], [[2.0, 3.0]], scale=4.0)
    kernel = replace(alone, down=torch.ones(1, 2, 3, 3), up=torch.ones(1, 1, 1, 1))
    tensors = written(kernel)
    assert tensors["lora_unet_alone_one.lora_down.weight"] is kernel.down
    assert tensors["lora_unet_alone_one.lora_up.weight"] is kernel.up
    assert float(tensors["lora_unet_alone_one.alpha"]) == 4.0


@pytest.mark.parametrize(
    ("up", "down"), [([[1.0], [2.0]], [[1.0, 2.0]]), ([[1.0]], [[1.0, 2.0, 3.0]])], ids=["rows", "inputs"]
)
def test_parts_that_do_not_fit_together_are_refused(up: list[list[float]], down: list[list[float]]) -> None:
    q = layer("q", [[1.0]], [[1.0, 0.0]])
    with pytest.raises(AdapterError, match=r"joined.*q is 1x2, k is \dx\d"):
        written(q, layer("k", up, down))


def test_rows_that_cannot_be_cut_into_pieces_are_refused() -> None:
    with pytest.raises(AdapterError, match="wide is 3x2"):
        written(layer("wide", [[1.0], [2.0], [3.0]], [[1.0, 0.0]]))


@pytest.mark.parametrize(
    ("layout", "denoiser", "shared"),
    [
        ("kohya", "unet", True),
        ("comfyui", "unet", True),
        ("kohya", "transformer", False),
        ("diffusers", "unet", False),
        ("lycoris", "unet", False),
    ],
)
def test_only_a_unet_in_original_names_needs_one_alpha(layout: Layout, denoiser: str, shared: bool) -> None:
    assert shares_alpha(layout, replace(SPEC, denoiser_name=denoiser)) is shared


def test_layouts_that_join_nothing_name_every_layer() -> None:
    layers = [layer("q", [[1.0]], [[1.0, 0.0]]), layer("k", [[1.0]], [[1.0, 0.0]])]
    paths = [each.path for each in layers]
    assert list(tensors_of(layers, "diffusers", make_key_map(paths, "diffusers", SPEC))) == [
        f"transformer.{path}.lora_{factor}.weight" for path in paths for factor in "AB"
    ]
    assert {
        key.split(".")[0] for key in tensors_of(layers, "lycoris", make_key_map(paths, "lycoris", SPEC))
    } == {
        "lycoris_q",
        "lycoris_k",
    }
    assert not header_of(layers, "kohya", SPEC)


def test_a_layer_without_a_name_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"kohya.*\blost\b"):
        make_key_map(["lost"], "kohya", SPEC)


def test_header_of_the_diffusers_layout_gives_a_layer_the_rank_of_no_other_one() -> None:
    """A pattern without a beginning also means every layer whose path ends in it."""
    layers = [
        layer("proj_out", [[1.0], [1.0]], [[1.0, 1.0]], scale=3.0),
        layer("blocks.0.proj_out", [[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2),
        layer("blocks.1.proj_out", [[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2),
    ]
    header = json.loads(header_of(layers, "diffusers", SPEC)["lora_adapter_metadata"])
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(nn.ModuleDict({"proj_out": nn.Linear(2, 2)}) for _ in range(2)),
            "proj_out": nn.Linear(2, 2),
        }
    )
    inject_adapter_in_model(
        LoraConfig(**{key.removeprefix("transformer."): value for key, value in header.items()}), model
    )
    found = {
        path: (module.r["default"], module.lora_alpha["default"])
        for path, module in model.named_modules()
        if isinstance(module, PeftLoraLayer)
    }
    assert found == {"proj_out": (1, 3), "blocks.0.proj_out": (2, 2), "blocks.1.proj_out": (2, 2)}

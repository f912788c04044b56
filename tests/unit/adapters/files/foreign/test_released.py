"""Files that other programs wrote: the authors' release, and stock LyCORIS."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, set_timestep_mask
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError

RANK = 4


class Attention(nn.Module):
    """Named as in diffusers; what the LoRA is for are its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 12), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """A block with an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = nn.ModuleDict({"attn1": Attention()})

    def forward(self, x: Tensor) -> Tensor:
        return self.mid_block["attn1"](x)  # type: ignore[no-any-return]


def released(prefix: str, *, with_base: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {}
    for name, (rows, columns) in {"to_q": (8, 12), "to_out": (12, 8)}.items():
        place = f"{prefix}mid_block.attn1.processor.{name}_lora"
        tensors |= {
            f"{place}.q_layer.weight": normal(RANK, columns),
            f"{place}.p_layer.weight": normal(rows, RANK),
            f"{place}.lambda_layer": normal(1, RANK),
        }
        if with_base:
            tensors |= {
                f"{place}.base_q.weight": normal(RANK, columns),
                f"{place}.base_p.weight": normal(rows, RANK),
                f"{place}.base_lambda": normal(1, RANK),
            }
    return tensors


def delta(tensors: dict[str, Tensor], place: str, ranks: int) -> Tensor:
    """P diag(lam m) Q - P0 diag(lam0 m) Q0, written out."""
    gate = (torch.arange(RANK) < ranks).float()

    def product(q: str, p: str, values: str) -> Tensor:
        return (
            tensors[f"{place}.{p}"]
            @ torch.diag(tensors[f"{place}.{values}"][0] * gate)
            @ tensors[f"{place}.{q}"]
        )

    trained = product("q_layer.weight", "p_layer.weight", "lambda_layer")
    return trained - product("base_q.weight", "base_p.weight", "base_lambda")


def run(model: nn.Module, adapter: LycorisAdapter, x: Tensor, *, timestep: int) -> Tensor:
    assert adapter.schedule is not None
    mask.set_mask(adapter.schedule, [timestep], group=adapter.group)
    try:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]
    finally:
        mask.clear_mask(adapter.group)


@pytest.mark.parametrize("prefix", ["", "unet.", "transformer."])
@pytest.mark.parametrize("timestep", [0, 500, 1000])
def test_authors_file_adds_what_its_factors_say_at_every_rank(
    prefix: str, timestep: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = released(prefix)
    save_file(tensors, tmp_path / "a.safetensors")
    model, x = Model().eval(), torch.randn(2, 5, 12)
    with caplog.at_level(logging.WARNING):
        adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert "min_rank 1" in caplog.text
    assert "alpha 1.0" in caplog.text
    assert adapter.tlora_config == RankSchedule(RANK).config()
    place, ranks = f"{prefix}mid_block.attn1.processor", RankSchedule(RANK).rank_at(timestep)
    attention = Model().mid_block["attn1"]
    assert isinstance(attention, Attention)
    first, last = attention.to_q, attention.to_out[0]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        hidden = first(x) + x @ delta(tensors, f"{place}.to_q_lora", ranks).T
        expected = last(hidden) + hidden @ delta(tensors, f"{place}.to_out_lora", ranks).T
    result = run(model, adapter, x, timestep=timestep)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_authors_vanilla_file_is_masked_and_not_taken_for_a_plain_lora(tmp_path: Path) -> None:
    place = "mid_block.attn1.processor.to_q_lora"
    down, up = torch.randn(RANK, 12), torch.randn(8, RANK)
    save_file({f"{place}.down.weight": down, f"{place}.up.weight": up}, tmp_path / "a.safetensors")
    model, x = Model().eval(), torch.randn(2, 5, 12)
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    layers = [module for module in model.modules() if isinstance(module, TLoraLayer)]
    assert [layer.is_vanilla for layer in layers] == [True]
    attention = Model().mid_block["attn1"]
    assert isinstance(attention, Attention)
    with torch.no_grad():
        hidden = attention.to_q(x) + x @ (up[:, :2] @ down[:2]).T
        expected = attention.to_out[0](hidden)
    torch.testing.assert_close(run(model, adapter, x, timestep=500), expected, rtol=1e-5, atol=1e-5)


PLACE = "mid_block.attn1.processor.to_q_lora"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PLACE}.base_q.weight": None}, "base_q"),
        ({f"{PLACE}.gate.weight": torch.ones(2, 2)}, r"gate\.weight"),
        ({"lycoris_other.alpha": torch.ones(())}, r"lycoris_other\.alpha"),
        ({f"unet.{PLACE}.base_q.weight": torch.ones(RANK, 12)}, r"base_q\.weight"),
        ({f"{PLACE}.down.weight": torch.ones(RANK, 12)}, "lora_down"),
    ],
)
def test_authors_file_that_lacks_or_adds_something_is_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {key: tensor for key, tensor in (released("") | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    model = Model().eval()
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(model, tmp_path / "a.safetensors")
    assert str(tmp_path) in str(caught.value)
    assert not [module for module in model.modules() if isinstance(module, TLoraLayer)]


@pytest.mark.parametrize("timestep", [0, 400, 900])
def test_file_of_stock_lycoris_does_what_the_stock_layer_does(timestep: int, tmp_path: Path) -> None:
    stock_model, x = Model().eval(), torch.randn(2, 5, 12)
    attention = stock_model.mid_block["attn1"]
    assert isinstance(attention, Attention)
    stock = TLoraModule("lycoris_mid_block_attn1_to_q", attention.to_q, 1.0, RANK, 2.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tensors = {f"{stock.lora_name}.{key}": value for key, value in stock.state_dict().items()}
    assert not [key for key in tensors if "base" in key], "stock files hold no base factors"
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    model = Model().eval()
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    stock.apply_to()
    set_timestep_mask(RankSchedule(RANK).mask([timestep]), 0)
    try:
        with torch.no_grad():
            expected = stock_model(x)
    finally:
        clear_timestep_mask(0)
    torch.testing.assert_close(run(model, adapter, x, timestep=timestep), expected, rtol=1e-5, atol=1e-5)

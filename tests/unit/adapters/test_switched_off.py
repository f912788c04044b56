"""An adapter that is switched off leaves the base model, bit for bit, in training mode too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.models.sdxl.tiny import make_unet
from tests.unit.adapters.attaching import attach

ATTENTION = {"apply_preset": {"target_module": ["Attention"]}}
RANK = {"multiplier": 1.0, "linear_dim": 8, "linear_alpha": 4.0}
DROPOUTS = {"rank_dropout": 0.5, "module_dropout": 0.5}


def int8(unet: nn.Module) -> None:
    quantize_(unet, Int8WeightOnlyConfig())


def nf4(unet: nn.Module) -> None:
    """Pack what is adapted."""
    for module in list(unet.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and name.startswith("to_"):
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=layer.bias is not None
                )
                packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False).to("cpu")
                packed.bias = layer.bias
                setattr(module, name, packed)


CASES: dict[str, tuple[Callable[[nn.Module], None] | None, dict[str, Any]]] = {
    "LoRA with dropout": (None, {"lora_rank": 8, "lora_dropout": 0.5}),
    "DoRA": (None, {"lora_rank": 8, "lora_dropout": 0.5, "use_dora": True}),
    "T-LoRA": (None, {"lycoris": {"algo": "tlora", **RANK, "tlora_min_rank": 2, **ATTENTION}}),
    "DoRA by LyCORIS": (None, {"lycoris": {"algo": "lora", **RANK, "weight_decompose": True, **ATTENTION}}),
    "LoKr with dropouts": (None, {"lycoris": {"algo": "lokr", **RANK, **DROPOUTS, **ATTENTION}}),
    "T-LoRA on int8": (int8, {"lycoris": {"algo": "tlora", **RANK, **ATTENTION}}),
    "T-LoRA on nf4": (nf4, {"lycoris": {"algo": "tlora", **RANK, **ATTENTION}}),
    "LoRA on nf4": (nf4, {"lora_rank": 8, "lora_dropout": 0.5}),
    "LoHa on nf4": (nf4, {"lycoris": {"algo": "loha", **RANK, "bypass_mode": True, **ATTENTION}}),
}


def predict(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    output: Tensor = unet(
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([900, 100]),
        encoder_hidden_states=torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator),
        added_cond_kwargs={"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)},
    ).sample
    return output


def moved(adapter: Adapter) -> Adapter:
    """The adapter with every factor away from its start, as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_switched_off_adapter_computes_the_base_model_and_draws_nothing(case: str) -> None:
    quantise, options = CASES[case][0], dict(CASES[case][1])
    torch.manual_seed(0)
    unet = make_unet().requires_grad_(False)
    if quantise is not None:
        quantise(unet)
    unet.train()
    base = predict(unet)
    adapter = moved(attach(unet, options.pop("lycoris", None), **options))
    trained = [parameter.requires_grad for parameter in adapter.parameters()]
    with adapter.rank_mask_for([900, 100]):
        assert not torch.allclose(predict(unet), base, atol=1e-3)
    state = torch.get_rng_state()
    with adapter.switched_off():  # and no mask, which a T-LoRA layer in training mode asks for
        assert torch.equal(predict(unet), base)
        assert [parameter.requires_grad for parameter in adapter.parameters()] == trained
    assert torch.equal(torch.get_rng_state(), state)
    with adapter.rank_mask_for([900, 100]):
        assert not torch.allclose(predict(unet), base, atol=1e-3)


def test_adapter_is_on_again_after_an_error() -> None:
    torch.manual_seed(0)
    unet = make_unet().requires_grad_(False).train()
    base = predict(unet)
    adapter = moved(attach(unet, lora_rank=8))
    with pytest.raises(KeyError), adapter.switched_off():
        raise KeyError
    assert not torch.equal(predict(unet), base)


def test_copy_of_an_adapted_model_uses_its_own_factors() -> None:
    torch.manual_seed(0)
    unet = make_unet().requires_grad_(False)
    adapter = moved(attach(unet, {"algo": "lora", **RANK, **ATTENTION}))
    copied, expected = copy.deepcopy(unet), predict(unet)
    moved(adapter)
    assert not torch.allclose(predict(unet), expected, atol=1e-3)
    assert torch.equal(predict(copied), expected)

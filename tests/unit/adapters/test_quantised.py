"""T-LoRA on bases whose weights are packed: int8, fp8, nf4. The adapter never reads them after it began."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.quantised import dequantize
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.errors import AdapterError
from tests.unit.adapters.attaching import attach


class Block(nn.Module):
    """What is adapted, by its class name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def bf16_base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block()).to(torch.bfloat16).requires_grad_(False).eval()


def int8(model: nn.Sequential) -> None:
    quantize_(model, Int8WeightOnlyConfig())


def fp8(model: nn.Sequential) -> None:
    quantize_(model, Float8WeightOnlyConfig())


def nf4(model: nn.Sequential) -> None:
    plain: nn.Linear = model[0].proj
    packed = bitsandbytes.nn.Linear4bit(64, 48, compute_dtype=torch.bfloat16, quant_type="nf4")
    packed.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4").to(
        "cpu"
    )
    packed.bias = plain.bias
    model[0].proj = packed


def llm_int8(model: nn.Sequential) -> None:
    plain: nn.Linear = model[0].proj
    packed = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    model[0].proj = packed.to("cpu").requires_grad_(False)


Quantise = Callable[[nn.Sequential], None]
TORCHAO, BITSANDBYTES = [int8, fp8], [nf4, llm_int8]


def adapt_block(model: nn.Module, **values: Any) -> LycorisAdapter:
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 8, "linear_alpha": 8.0} | values
    return attach(model, values | {"apply_preset": {"target_module": ["Block"]}})


def run(model: nn.Module, adapter: LycorisAdapter, timestep: int = 400) -> Tensor:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with adapter.rank_mask_for([timestep] * 3):
        output: Tensor = model(x)
        if torch.is_grad_enabled():
            output.float().square().mean().backward()
    return output.detach()


def delta(adapter: LycorisAdapter) -> Tensor:
    (layer,) = adapter.network.loras
    return layer.get_diff_weight()[0].detach()


@pytest.mark.parametrize("quantise", TORCHAO + BITSANDBYTES)
@pytest.mark.parametrize("init", ["random", "vanilla"])
def test_packed_base_trains_from_zero_and_the_file_reloads_exactly_on_the_bf16_base(
    quantise: Quantise, init: str, tmp_path: Path
) -> None:
    model = bf16_base()
    quantise(model)
    with torch.no_grad():
        base = model(torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16))
    adapter = adapt_block(model, tlora_init=init)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    assert torch.equal(run(model, adapter), base), "the delta is not zero at the start"
    for step in range(3):
        if step:
            run(model, adapter)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert float(delta(adapter).norm()) > 0
    assert not adapter.base_hashes, "a packed weight was hashed as if it were the numbers it stands for"
    adapter.save(tmp_path / "a.safetensors", metadata={})
    loaded = load_adapter(bf16_base(), tmp_path / "a.safetensors")
    torch.testing.assert_close(delta(loaded), delta(adapter), rtol=0, atol=1e-6)
    loaded.save(tmp_path / "b.safetensors", metadata={})
    first, second = (
        adapter_file.read(tmp_path / name).tensors for name in ("a.safetensors", "b.safetensors")
    )
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("quantise", TORCHAO + BITSANDBYTES)
def test_init_from_the_weight_takes_the_numbers_that_the_packed_weight_stands_for(quantise: Quantise) -> None:
    model = bf16_base()
    quantise(model)
    (layer,) = adapt_block(model, tlora_init="weight", sig_type="principal").network.loras
    true_values = torch.linalg.svdvals(bf16_base()[0].proj.weight.float())[:8]
    torch.testing.assert_close(layer.base_lambda, true_values, rtol=0.1, atol=0)
    inverse = dequantize(model[0].proj, (48, 64), name="proj")
    assert (inverse.float() - bf16_base()[0].proj.weight.float()).norm() < 0.1 * inverse.float().norm()


def test_weight_that_is_packed_in_an_unknown_way_is_refused_naming_the_layer() -> None:
    model = bf16_base()
    model[0].proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"lycoris_0_proj.*uint8.*tlora_init"):
        adapt_block(model, tlora_init="weight")
    assert not [module for module in model.modules() if isinstance(module, TLoraLayer)]


@pytest.mark.parametrize("quantise", TORCHAO)
def test_quantising_an_adapted_model_leaves_the_factors_alone(quantise: Quantise) -> None:
    model = bf16_base()
    adapter = adapt_block(model)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    quantise(model)
    assert type(model[0].proj.weight.detach()) is not Tensor, "the base was not quantised"
    for key, tensor in adapter.state_dict().items():
        assert type(tensor) is Tensor
        assert torch.equal(tensor, before[key])
    run(model, adapter)

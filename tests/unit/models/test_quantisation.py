"""Quantised linear layers: which they are, what they compute, and what a family does with its encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from simpletuner.helpers.adapters.quantised import dequantize
from simpletuner.helpers.configuration.schema.sections import Precision, PrecisionConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.quantisation import (
    quantised_layers,
    quantize_and_move,
    quantize_and_move_text_encoder,
    text_precision_identity,
)
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.sdxl.tiny import make_unet
from simpletuner.helpers.models.tiny_parts import fill_weights

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("int8-torchao", "fp8-torchao", "nf4-bnb")


class Blocks(nn.Module):
    """Two blocks between an embedding and a projection, all of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in "ab"
        )
        self.proj_out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = x + block(x)
        return self.proj_out(x)


def model(dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(0)
    return Blocks().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(layer: nn.Linear) -> Tensor:
    return dequantize(layer, (layer.out_features, layer.in_features), name="layer")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_of_the_blocks_are_quantised_and_everything_else_is_kept(precision: Precision) -> None:
    quantised = quantize_and_move(model(), precision=precision, device=CPU)
    plain = dict(model().named_modules())
    rows_of_64 = {"blocks.0.0", "blocks.1.0"}
    expected = rows_of_64 if precision == "nf4-bnb" else {*rows_of_64, "blocks.0.2", "blocks.1.2"}
    for path, layer in quantised.named_modules():
        if isinstance(layer, nn.Linear):
            kept = type(layer.weight) is nn.Parameter and torch.equal(layer.weight, plain[path].weight)
            assert kept == (path not in expected), path
            assert torch.equal(layer.bias, plain[path].bias)
    assert not any(parameter.requires_grad for parameter in quantised.parameters())


@pytest.mark.parametrize(
    ("precision", "bytes_per_weight"), [("int8-torchao", 1), ("fp8-torchao", 1), ("nf4-bnb", 0.5)]
)
def test_weights_take_the_memory_that_the_format_says(precision: Precision, bytes_per_weight: float) -> None:
    weight = quantize_and_move(model(torch.bfloat16), precision=precision, device=CPU).blocks[0][0].weight
    codes = weight if precision == "nf4-bnb" else weight.qdata
    assert codes.numel() * codes.element_size() == 64 * 96 * bytes_per_weight


@pytest.mark.parametrize(
    ("precision", "error"), [("int8-torchao", 0.01), ("fp8-torchao", 0.04), ("nf4-bnb", 0.12)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_the_weight_to_within_its_format(
    precision: Precision, error: float, dtype: torch.dtype
) -> None:
    plain = model(dtype).blocks[0][0].weight.detach().float()
    rounded = dense(quantize_and_move(model(dtype), precision=precision, device=CPU).blocks[0][0]).float()
    found = float((rounded - plain).norm() / plain.norm())
    assert error / 4 < found < error


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_and_gradients_are_those_of_the_rounded_weights(precision: Precision) -> None:
    quantised = quantize_and_move(model(), precision=precision, device=CPU)
    rounded = model().requires_grad_(False)
    for path in quantised_layers(rounded, precision):
        rounded.get_submodule(path).weight.copy_(dense(quantised.get_submodule(path)))
    results = []
    for each in (quantised, rounded):
        x = inputs().requires_grad_()
        output = each(x)
        output.square().sum().backward()
        results.append((output.detach(), x.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pictures_between_steps_change_nothing_for_the_next_step(precision: Precision) -> None:
    quantised = quantize_and_move(model(torch.bfloat16), precision=precision, device=CPU)

    def step() -> tuple[Tensor, Tensor]:
        x = inputs(torch.bfloat16).requires_grad_()
        output = quantised.train()(x)
        output.float().square().sum().backward()
        assert x.grad is not None
        return output.detach(), x.grad

    before = step()
    with torch.no_grad():
        torch.testing.assert_close(quantised.eval()(inputs(torch.bfloat16)), before[0])
    assert all(torch.equal(first, second) for first, second in zip(before, step(), strict=True))


def test_unet_keeps_embeddings_resnets_and_convolutions() -> None:
    paths = quantised_layers(make_unet(), "int8-torchao").keys()
    assert {path.rpartition(".")[2] for path in paths} == {
        *("to_q", "to_k", "to_v", "0", "2", "proj", "proj_in", "proj_out")
    }
    assert not [path for path in paths if "emb" in path or "resnets" in path or "block" not in path]
    assert {path for path in paths if path.startswith("mid_block.attentions.0.proj")}


def test_quantised_weights_are_put_where_they_are_wanted() -> None:
    quantised = quantize_and_move(model(), precision="int8-torchao", device=CPU, home=torch.device("meta"))
    assert {parameter.device.type for parameter in quantised.parameters()} == {"meta"}


def test_model_without_a_layer_that_fits_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Sequential: no linear layer .* fit int8-torchao.*no_change"):
        quantize_and_move(nn.Sequential(nn.Linear(64, 64)), precision="int8-torchao", device=CPU)
    with pytest.raises(ModelError, match="fit nf4-bnb"):
        quantize_and_move(nn.Sequential(nn.ModuleList([nn.Linear(96, 64)])), precision="nf4-bnb", device=CPU)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_t5_encodes_in_every_precision_since_its_wo_layers_are_kept(precision: Precision) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    encoder = T5EncoderModel(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = encoder(ids)[0]
        quantised = quantize_and_move_text_encoder(
            encoder, 2, PrecisionConfig(text_encoder_2_precision=precision), device=CPU
        )
        found = quantised(ids)[0]
    assert type(encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight) is nn.Parameter
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.2


def test_text_identity_names_only_the_encoders_that_are_quantised() -> None:
    assert text_precision_identity(PrecisionConfig()) == ""
    config = PrecisionConfig(text_encoder_2_precision="nf4-bnb", text_encoder_4_precision="int8-torchao")
    assert text_precision_identity(config) == " 2=nf4-bnb 4=int8-torchao"


@pytest.mark.parametrize("number", [1, 2])
def test_sdxl_quantises_the_text_encoder_that_is_named_and_caches_it_apart(
    sdxl: Callable[..., SDXL], number: int
) -> None:
    plain, config = (
        sdxl(),
        PrecisionConfig.model_validate({f"text_encoder_{number}_precision": "int8-torchao"}),
    )
    quantised = sdxl(precision=config)
    assert quantised.text_identity == f"{plain.text_identity} {number}=int8-torchao"
    for family in (plain, quantised):
        family.load_text_encoders()
    (found,), (expected,) = quantised.encode_prompts(["a cat"]), plain.encode_prompts(["a cat"])
    width = expected.prompt_embeds.shape[-1] // 2  # of each encoder's part
    parts = [
        found.prompt_embeds[..., part] == expected.prompt_embeds[..., part]
        for part in (slice(width), slice(width, None))
    ]
    assert [bool(part.all()) for part in parts] == [number != 1, number != 2]
    assert float((found.prompt_embeds - expected.prompt_embeds).norm() / expected.prompt_embeds.norm()) < 0.05


def test_denoiser_stays_on_the_host_where_it_is_quantised_or_offloaded(
    sdxl: Callable[..., SDXL], tmp_path: Path
) -> None:
    family = sdxl()
    assert family.denoiser_device == family.device
    for changes in ({"base_model_precision": "int8-torchao"}, {"enable_group_offload": True}):
        there = sdxl(precision=PrecisionConfig.model_validate(changes))
        there.device = torch.device("meta")
        assert there.denoiser_device == CPU
        assert {weight.device for weight in there.load_denoiser().parameters()} == {CPU}


def test_every_precision_makes_the_unet_predict_nearly_the_same() -> None:
    def predict(precision: Precision) -> Tensor:
        unet = make_unet()
        fill_weights(unet, seed=0)
        unet = quantize_and_move(unet, precision=precision, device=CPU)
        generator = torch.Generator().manual_seed(0)
        added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
        text = torch.randn(2, 77, 64, generator=generator)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        with torch.no_grad():
            output: Tensor = unet(latents, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample
        return output

    plain = predict("no_change")
    errors = {each: float((predict(each) - plain).norm() / plain.norm()) for each in PRECISIONS}
    assert 0 < errors["int8-torchao"] < errors["fp8-torchao"] < 0.1
    assert 0 < errors["nf4-bnb"] < 0.1

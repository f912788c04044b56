"""Linear layers in 8 or 4 bits: a frozen model in half or a quarter of the memory, a little less exact.

The model comes in 16 bits on the host, and each layer is quantised on the device by itself, so that the whole
model never has to fit there in 16 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.optional import require

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.model_sections import Precision, PrecisionConfig

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

TILE = 16
"""Both edges of a quantised layer are multiples of this, as a GPU's matrix kernels want them."""
BLOCKS: Mapping[str, int] = {"nf4-bnb": 64}
"""Weights that share a scale; of these a row holds a whole number."""
KEPT_IN_NAMES = "emb"
"""In the path of layers that are small and feed every block: embeddings and their projections."""
KEPT_NAMES = frozenset({"wo"})
"""T5 casts its input to the dtype of this weight, which is that of the codes in 4 bits."""


def quantize_and_move(
    model: M, *, precision: Precision, device: torch.device, home: torch.device | None = None
) -> M:
    """Freeze a model and move it to the device, its large linear layers quantised on the way.

    Args:
        model: On the host, in 16 bits.
        precision: Of those layers; no_change only moves the model.
        device: Where layers are quantised, one at a time.
        home: Where the model is put instead.

    Raises:
        ModelError: No layer of the model can be quantised.
        MissingDependencyError: The package that quantises is not installed.
    """
    model.requires_grad_(False)
    if precision != "no_change":
        layers = quantised_layers(model, precision)
        if not layers:
            raise ModelError(
                f"{type(model).__name__}: no linear layer of its blocks has edges that fit {precision}. "
                "Set its precision to no_change."
            )
        share = sum(layer.weight.numel() for layer in layers.values()) / _num_weights(model)
        quantise = QUANTISERS[precision]
        for path, layer in layers.items():
            model.set_submodule(path, quantise(layer, device).to(home or device))
        logger.info(
            "%s: %d linear layers in %s, %.0f %% of its weights.",
            type(model).__name__,
            len(layers),
            precision,
            100 * share,
        )
    return model.to(home or device)


def quantised_layers(model: nn.Module, precision: Precision) -> dict[str, nn.Linear]:
    """Path -> linear layer of those that are quantised: in the repeated blocks, with edges that fit.

    What stays as it is: embeddings, what projects them, the layers before and after the blocks, norms,
    convolutions.
    """
    lists = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    block = BLOCKS.get(precision, TILE)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        if path.startswith(lists) and KEPT_IN_NAMES not in path and KEPT_NAMES.isdisjoint(path.split("."))
        if module.in_features % block == 0 and module.out_features % TILE == 0
    }


def text_precisions(config: PrecisionConfig) -> tuple[Precision, ...]:
    """Of each text encoder, in the family's own order; more than any family has."""
    return (
        config.text_encoder_1_precision,
        config.text_encoder_2_precision,
        config.text_encoder_3_precision,
        config.text_encoder_4_precision,
    )


def quantize_and_move_text_encoder(
    encoder: M, number: int, config: PrecisionConfig, *, device: torch.device
) -> M:
    """Freeze text encoder `number`, counted from 1, and move it to the device in the user's precision.

    Raises:
        ModelError: No layer of it can be quantised.
        MissingDependencyError: The package that quantises is not installed.
    """
    return quantize_and_move(encoder, precision=text_precisions(config)[number - 1], device=device)


def text_precision_identity(config: PrecisionConfig) -> str:
    """What a family adds to its text identity: empty, unless a text encoder is quantised."""
    quantised = enumerate(text_precisions(config), start=1)
    return "".join(f" {number}={each}" for number, each in quantised if each != "no_change")


def _int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    """8-bit integers with a scale for each row."""
    torchao = require("torchao.quantization", extra="quant")
    return _by_torchao(layer.to(device), torchao.Int8WeightOnlyConfig())


def _fp8(layer: nn.Linear, device: torch.device) -> nn.Module:
    """8-bit floats (e4m3) with a scale for each row."""
    torchao = require("torchao.quantization", extra="quant")
    return _by_torchao(layer.to(device), torchao.Float8WeightOnlyConfig())


def _by_torchao(layer: nn.Linear, config: object) -> nn.Module:
    require("torchao.quantization", extra="quant").quantize_(layer, config)
    return layer


def _nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    """4-bit codes of a normal distribution, with a scale for each 64 weights."""
    packed = _linear_4bit()(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    params = require("bitsandbytes", extra="quant").nn.Params4bit
    weight = params(layer.weight.data, requires_grad=False, quant_type="nf4", module=packed)
    packed.register_parameter("weight", weight)
    packed.register_parameter("bias", layer.bias)
    return cast(nn.Module, packed.to(device).train(layer.training))  # it is quantised as it moves


@cache
def _linear_4bit() -> Callable[..., Any]:
    class Linear4bit(require("bitsandbytes", extra="quant").nn.Linear4bit):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # Some CPUs would repack the weight in evaluation, for a kernel that has no backward.
            self.support_avx512bf16_for_cpu = False

    return Linear4bit


QUANTISERS: Mapping[str, Callable[[nn.Linear, torch.device], nn.Module]] = {
    "int8-torchao": _int8,
    "fp8-torchao": _fp8,
    "nf4-bnb": _nf4,
}


def _num_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

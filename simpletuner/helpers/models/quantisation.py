"""Linear layers in 8 or 4 bits: a frozen model in half or a quarter of the memory, a little less exact.

The model is in 16 bits on the host. Layers are quantised on the device one at a time, so the whole model
never has to fit there in 16 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from simpletuner.helpers.choices.precisions import KEPT_IN_NAMES, PRECISIONS, TILE, UNCHANGED
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.optional import require

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import Precision, PrecisionConfig

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

KEPT_NAMES = frozenset({"wo"})
"""T5 casts its input to the dtype of this weight, which in 4 bits is the dtype of the codes."""


def quantize_and_move(
    model: M, *, precision: Precision, device: torch.device, home: torch.device | None = None
) -> M:
    """Freeze a model and move it to the device, its large linear layers quantised on the way.

    Args:
        model: On the host, in 16 bits.
        precision: Format of those layers; no_change only moves the model.
        device: Device on which layers are quantised, one at a time.
        home: Device of the model afterwards. Default: `device`.

    Raises:
        ModelError: No layer of the model can be quantised.
        MissingDependencyError: The package that quantises is not installed.
    """
    model.requires_grad_(False)
    if precision != UNCHANGED:
        layers = quantised_layers(model, precision)
        if not layers:
            raise ModelError(
                f"{type(model).__name__}: no linear layer of its blocks has edges that fit {precision}. "
                f"Set its precision to {UNCHANGED}."
            )
        share = sum(layer.weight.numel() for layer in layers.values()) / _num_weights(model)
        quantise: Callable[[nn.Linear, torch.device], nn.Module] = PRECISIONS[precision].load()
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
    """Path -> linear layer to quantise: in the repeated blocks, with edges that fit.

    Embeddings, their projections, layers outside the blocks, norms and convolutions keep their format.
    """
    lists = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    row_multiple = PRECISIONS[precision].row_multiple
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        if path.startswith(lists) and KEPT_IN_NAMES not in path and KEPT_NAMES.isdisjoint(path.split("."))
        if module.in_features % row_multiple == 0 and module.out_features % TILE == 0
    }


def text_precisions(config: PrecisionConfig) -> tuple[Precision, ...]:
    """Precision of each text encoder, in the family's order; families have up to four."""
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
    """Suffix of a family's text identity: empty unless a text encoder is quantised."""
    quantised = enumerate(text_precisions(config), start=1)
    return "".join(f" {number}={each}" for number, each in quantised if each != UNCHANGED)


def int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    """8-bit integers with a scale per row."""
    torchao = require("torchao.quantization", extra="quant")
    return _by_torchao(layer.to(device), torchao.Int8WeightOnlyConfig())


def fp8(layer: nn.Linear, device: torch.device) -> nn.Module:
    """8-bit floats (e4m3) with a scale per row."""
    torchao = require("torchao.quantization", extra="quant")
    return _by_torchao(layer.to(device), torchao.Float8WeightOnlyConfig())


def _by_torchao(layer: nn.Linear, config: object) -> nn.Module:
    require("torchao.quantization", extra="quant").quantize_(layer, config)
    return layer


def nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    """4-bit codes of a normal distribution, with a scale per 64 weights."""
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
    return cast(nn.Module, packed.to(device).train(layer.training))  # moving to the device quantises it


@cache
def _linear_4bit() -> Callable[..., Any]:
    class Linear4bit(require("bitsandbytes", extra="quant").nn.Linear4bit):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # Some CPUs would repack the weight in evaluation, for a kernel that has no backward.
            self.support_avx512bf16_for_cpu = False

    return Linear4bit


def _num_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

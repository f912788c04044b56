"""The original names of Flux's layers, against what diffusers makes of the original checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from simpletuner.helpers.adapters.files.layouts import make_key_map, tensors_of
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux2 import spec as flux2

BLOCKS = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
# Model of real width, its facts, and diffusers' converter of the original checkpoint.
FLUX = (
    FluxTransformer2DModel,
    flux.SPEC,
    single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
)
FLUX2 = (
    Flux2Transformer2DModel,
    flux2.SPEC,
    single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
)
FAMILIES = pytest.mark.parametrize(("kind", "spec", "convert"), [FLUX, FLUX2], ids=["flux", "flux2"])


class Original(dict[str, Tensor]):
    """A checkpoint whose weights are given; its biases and norms, which no adapter changes, are zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        if key not in self and not key.endswith(".lin.weight") and ("bias" in key or "norm" in key):
            return torch.zeros(21504)
        return super().pop(key, *default)


def linear_layers(kind: Callable[..., nn.Module]) -> dict[str, nn.Linear]:
    with torch.device("meta"):
        model = kind(**BLOCKS)
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@FAMILIES
def test_diffusers_converter_gives_every_layer_its_rows_back(kind: Any, spec: Any, convert: Any) -> None:
    layers = linear_layers(kind)
    generator = torch.Generator().manual_seed(0)
    # A column stands for a weight: the converter takes no notice of inputs, and real widths stay small.
    columns = {
        path: torch.randn(layer.out_features, 1, generator=generator) for path, layer in layers.items()
    }
    plain = [LoraLayer(path, torch.ones(1, 1), column, 1.0, 0.0) for path, column in columns.items()]
    names = {
        f"lora_unet_{name}".replace(".", "_"): name
        for name in (_original_name(spec, path) for path in columns)
    }
    original = Original()
    for key, tensor in tensors_of(plain, "kohya", make_key_map(columns, "kohya", spec)).items():
        layer, _, part = key.partition(".")
        if part == "lora_up.weight":
            original[f"{names[layer]}.weight"] = tensor.sum(1, keepdim=True)
    converted = convert(original)
    weights = {key.removesuffix(".weight"): value for key, value in converted.items() if value.shape[-1] == 1}
    assert weights.keys() == columns.keys()
    assert not [path for path, column in columns.items() if not torch.equal(weights[path], column)]


def _original_name(spec: Any, path: str) -> str:
    found = spec.original_name(path)
    return found if isinstance(found, str) else found.name


@FAMILIES
@pytest.mark.parametrize(
    "path", ["transformer_blocks.0.attn.to_x", "transformer_blocks.x.attn.to_q", "blocks.0.attn.to_q", "attn"]
)
def test_a_path_that_is_not_there_is_refused(kind: Any, spec: Any, convert: Any, path: str) -> None:
    with pytest.raises(ValueError, match=rf"{path} is not a layer of Flux\.\d's transformer"):
        spec.original_name(path)

"""Exported files of Flux adapters in the loaders of others: every layer arrives, and does its part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux2 import spec as flux2
from tests.integration.attached import attach_tlora

FAMILIES = {"flux": flux.SPEC, "flux2": flux2.SPEC}
WIDTH = 32
SHARED = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": WIDTH // 16,
    "guidance_embeds": True,
}


@dataclass(frozen=True)
class Kind:
    """One of the two families at toy size."""

    spec: ModelSpec
    model: Any
    pipeline: Any
    blocks: tuple[str, ...]
    sizes: Mapping[str, Any]
    ids: int
    """Coordinates of a token's place."""

    def make(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.model(**SHARED, **self.sizes, **changes).eval().requires_grad_(False)

    def pipe(self, model: Any) -> Any:
        others = {"vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
        absent = dict.fromkeys(others & self.pipeline._get_signature_types().keys())
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return self.pipeline(scheduler=scheduler, transformer=model, **absent)

    def predict(self, model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        values = {
            "hidden_states": torch.randn(2, 16, 16, generator=generator),
            "encoder_hidden_states": torch.randn(
                2, 7, self.sizes["joint_attention_dim"], generator=generator
            ),
            "timestep": torch.full((2,), 0.4),
            "guidance": torch.full((2,), 3.5),
            "img_ids": torch.zeros(16, self.ids),
            "txt_ids": torch.zeros(7, self.ids),
        }
        if "pooled_projection_dim" in self.sizes:
            values["pooled_projections"] = torch.ones(2, WIDTH)
        with torch.no_grad():
            return model(**values, return_dict=False)[0]


FLUX = Kind(
    flux.SPEC,
    FluxTransformer2DModel,
    diffusers.FluxPipeline,
    ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    {"joint_attention_dim": 32, "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 4, 8)},
    3,
)
FLUX2 = Kind(
    flux2.SPEC,
    Flux2Transformer2DModel,
    diffusers.Flux2Pipeline,
    ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    {"joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4)},
    4,
)
KLEIN = Kind(
    flux2.SPEC,
    Flux2Transformer2DModel,
    diffusers.Flux2KleinPipeline,
    FLUX2.blocks,
    FLUX2.sizes,
    4,
)
MIXED = {
    "target_name": ["transformer_blocks", "single_transformer_blocks"],
    "name_algo_map": {".*to_k$": {"linear_dim": 2, "linear_alpha": 1.5}},
}
"""A joined layer's parts differ in rank and scale."""
KINDS = pytest.mark.parametrize("kind", [FLUX, FLUX2, KLEIN], ids=["flux", "flux2", "klein"])


def attach(model: Any, spec: ModelSpec, **options: Any) -> LycorisAdapter:
    small = {"linear_dim": 4, "linear_alpha": 4.0, "tlora_min_rank": 1}
    return attach_tlora(model, spec, off_start=0.3, **(small | options))


def exported(adapter: LycorisAdapter, spec: ModelSpec, folder: Path, **options: Any) -> Path:
    adapter.save(folder / "adapter.safetensors", metadata={"model_family": spec.name})
    (one,) = export_adapter(
        folder / "adapter.safetensors",
        folder / "out.safetensors",
        ExportOptions(**options),
        families=FAMILIES,
    )
    assert len(one.errors) == adapter.num_layers
    return one.file


def live(kind: Kind, model: Any, adapter: LycorisAdapter, *, timestep: int) -> tuple[Tensor, Tensor]:
    """The prediction with the adapter at a timestep's ranks, and without it."""
    assert adapter.schedule is not None
    mask.set_mask(adapter.schedule, [timestep], group=adapter.group)
    with_adapter = kind.predict(model)
    mask.clear_mask(adapter.group)
    adapter.detach()
    return with_adapter, kind.predict(model)


def close(result: Tensor, expected: Tensor, *, base: Tensor) -> bool:
    """Whether a result is off by less than 1e-5 of what the adapter changes."""
    effect = (expected - base).norm()
    assert effect > 2e-2 * base.norm(), "the adapter changes too little"
    return bool((result - expected).norm() < 1e-5 * effect)


def injected(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


@KINDS
@pytest.mark.parametrize("init", ["random", "vanilla"])
def test_stock_diffusers_loads_every_layer_and_predicts_what_the_live_adapter_does(
    kind: Kind, init: str, tmp_path: Path
) -> None:
    model = kind.make()
    adapter = attach(
        model,
        kind.spec,
        tlora_init=init,
        linear_alpha=3.0,
        apply_preset={"target_module": [*kind.blocks, "AdaLayerNormContinuous"]},
    )
    num_layers = adapter.num_layers
    file = exported(adapter, kind.spec, tmp_path, timestep=400)
    expected, base = live(kind, model, adapter, timestep=400)
    pipeline = kind.pipe(model)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert len(injected(model)) == num_layers
    assert close(kind.predict(model), expected, base=base)


@KINDS
def test_stock_peft_loads_the_diffusers_layout(kind: Kind, tmp_path: Path) -> None:
    model = kind.make()
    adapter = attach(model, kind.spec)
    file = exported(adapter, kind.spec, tmp_path)
    expected, base = live(kind, model, adapter, timestep=0)
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    model = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=paths), kind.make())
    assert not set_peft_model_state_dict(model, tensors).unexpected_keys
    assert len(injected(model)) == adapter.num_layers
    assert close(kind.predict(model), expected, base=base)


@pytest.mark.parametrize("kind", [FLUX2, KLEIN], ids=["flux2", "klein"])
@pytest.mark.parametrize(
    "options",
    [
        {"tlora_init": "random"},
        {"tlora_init": "vanilla", "linear_alpha": 3.0, "multiplier": 0.5},
        {"apply_preset": MIXED},
    ],
    ids=["random", "scaled vanilla", "ranks and scales that differ within a joined layer"],
)
def test_stock_diffusers_loads_the_original_names_of_flux2(
    kind: Kind, options: dict[str, Any], tmp_path: Path
) -> None:
    model = kind.make()
    adapter = attach(model, kind.spec, **options)
    num_layers = adapter.num_layers
    file = exported(adapter, kind.spec, tmp_path, layout="kohya", timestep=400)
    expected, base = live(kind, model, adapter, timestep=400)
    kind.pipe(model).load_lora_weights(str(tmp_path), weight_name=file.name)
    assert len(injected(model)) == num_layers
    assert close(kind.predict(model), expected, base=base)


def test_parts_that_are_not_adapted_are_zero_in_a_joined_layer(tmp_path: Path) -> None:
    model = FLUX2.make()
    adapter = attach(model, FLUX2.spec, apply_preset={"target_name": r"transformer_blocks.*to_v$"})
    file = exported(adapter, FLUX2.spec, tmp_path, layout="kohya")
    assert adapter.num_layers == 2
    up = load_file(file)["lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"]
    assert up.shape == (3 * WIDTH, 8)
    assert not up[: 2 * WIDTH].any()
    expected, base = live(FLUX2, model, adapter, timestep=0)
    FLUX2.pipe(model).load_lora_weights(str(tmp_path), weight_name=file.name)
    assert len(injected(model)) == 6, "diffusers gives each part a layer"
    assert close(FLUX2.predict(model), expected, base=base)


def test_stock_diffusers_loads_the_original_names_of_flux_at_its_real_width(tmp_path: Path) -> None:
    """Its converter knows no other width; the layers are compared one by one, without the base weights."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    number = torch.zeros(1, 1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
            module.weight = nn.Parameter(number.expand(shape), requires_grad=False)
    adapter = attach(
        model,
        FLUX.spec,
        apply_preset=MIXED,
    )
    assert {layer.scale for layer in adapter.network.loras} == {1.0, 0.75}
    layers = {module.lora_name: module for module in adapter.network.loras}
    file = exported(adapter, FLUX.spec, tmp_path, layout="comfyui")
    assert len(layers) == 20
    assert sum(key.endswith(".alpha") for key in load_file(file)) == 13
    adapter.detach()
    FLUX.pipe(model).load_lora_weights(str(tmp_path), weight_name=file.name)
    loaded = injected(model)
    assert len(loaded) == len(layers)
    for path, lora in loaded.items():
        layer = layers[f"lycoris_{path}".replace(".", "_")]
        assert isinstance(layer, TLoraLayer)
        with torch.no_grad():
            x = torch.randn(3, lora.in_features, generator=torch.Generator().manual_seed(5))
            a, b = layer.lora_factors()
            expected = x @ a.T @ b.T * layer.scale
            result = lora.lora_B["default_0"](lora.lora_A["default_0"](x)) * lora.scaling["default_0"]
        assert (result - expected).norm() < 1e-5 * expected.norm(), path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_command_says_how_many_layers_were_joined(dtype: str, tmp_path: Path) -> None:
    adapter = attach(FLUX.make(), FLUX.spec)
    adapter.save(tmp_path / "adapter.safetensors", metadata={"model_family": "flux"})
    options = ExportOptions(layout="comfyui", dtype=dtype)
    (one,) = export_adapter(
        tmp_path / "adapter.safetensors", tmp_path / "out.safetensors", options, families=FAMILIES
    )
    assert re.search(r"\b20 layers of ranks 8 to 32, .*\b4\b.*\b34; error", one.summary())
    assert (max(one.errors.values()) > 0) == (dtype == "bf16")

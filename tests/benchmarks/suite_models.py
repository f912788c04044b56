"""Denoisers with random weights made on the device, and what trains beside them, for the GPU suite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from models import SDXL as SDXL_CONFIG
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.models.flux.spec import SPEC as FLUX_SPEC
from simpletuner.helpers.models.flux2.spec import SPEC as FLUX2_SPEC
from simpletuner.helpers.models.sdxl.spec import SPEC as SDXL_SPEC

TOY_TRANSFORMER = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
}
TOY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
    "layers_per_block": 1,
}
KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


@dataclass(frozen=True)
class Denoiser:
    """A denoiser at its real size and at toy size."""

    name: str
    model: type[Any]
    config: dict[str, Any]
    toy: dict[str, Any]
    spec: ModelSpec
    inputs: Callable[..., dict[str, Any]]
    """Config, edge of the latents or tokens, number of text tokens, batch -> inputs on the default device."""
    edge: int = 64
    text: int = 512
    limit_ms: float | None = None
    """Step of a LoRA with full checkpointing at 1024 px and 790 TFLOP/s; source: the FLOP count."""

    def at_toy_size(self) -> Denoiser:
        """The same kind of model, of a size for a CPU."""
        name, config = f"{self.name.partition(',')[0]}, toy", {**self.config, **self.toy}
        return replace(self, name=name, config=config, edge=4, text=8, limit_ms=None)

    def shallow(self, *, double: int, single: int) -> Denoiser:
        """The same transformer with fewer blocks."""
        config = {**self.config, "num_layers": double, "num_single_layers": single}
        return replace(self, name=f"{self.name}, {double} + {single} blocks", config=config, limit_ms=None)

    def make(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The frozen model, its random weights made on the device in its dtype."""
        torch.manual_seed(0)
        with _made_on(device, dtype):
            return self.model(**self.config).requires_grad_(False).train()


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors on a device and in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _unet_inputs(config: Any, edge: int, text: int, batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, config.in_channels, edge, edge),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, text, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.ones(batch, 6)},
    }


def _flux_inputs(config: Any, edge: int, text: int, batch: int) -> dict[str, Any]:
    inputs = {
        "hidden_states": torch.randn(batch, edge**2, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5),
        "txt_ids": torch.zeros(text, len(config.axes_dims_rope), dtype=torch.float32),
        "img_ids": torch.randint(0, edge, (edge**2, len(config.axes_dims_rope))).float(),
    }
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = torch.randn(batch, config.pooled_projection_dim)
    if config.guidance_embeds:
        inputs["guidance"] = torch.ones(batch)
    return inputs


def _flux2_inputs(config: Any, edge: int, text: int, batch: int) -> dict[str, Any]:
    inputs = _flux_inputs(config, edge, text, batch)
    return inputs | {name: inputs[name].expand(batch, -1, -1) for name in ("txt_ids", "img_ids")}


SDXL = Denoiser(
    "SDXL",
    UNet2DConditionModel,
    SDXL_CONFIG,
    TOY_UNET,
    SDXL_SPEC,
    _unet_inputs,
    edge=128,
    text=77,
    limit_ms=24.0,
)
FLUX = Denoiser(
    "Flux.1",
    FluxTransformer2DModel,
    {"guidance_embeds": True},
    {**TOY_TRANSFORMER, "axes_dims_rope": (4, 4, 8)},
    FLUX_SPEC,
    _flux_inputs,
    limit_ms=311.0,
)
KLEIN_4B = Denoiser(
    "Flux.2 Klein 4B",
    Flux2Transformer2DModel,
    KLEIN,
    {**TOY_TRANSFORMER, "axes_dims_rope": (4, 4, 4, 4)},
    FLUX2_SPEC,
    _flux2_inputs,
    limit_ms=144.0,
)


@dataclass(frozen=True)
class Stage:
    """A model on its device with inputs that every contender shares."""

    denoiser: Denoiser
    device: torch.device
    dtype: torch.dtype
    rank: int
    base: Any
    inputs: dict[str, Any]

    @classmethod
    def of(
        cls, denoiser: Denoiser, *, device: torch.device, dtype: torch.dtype, rank: int, batch: int
    ) -> Stage:
        """Make the model and its inputs."""
        base = denoiser.make(device, dtype)
        with _made_on(device, dtype):
            inputs = denoiser.inputs(base.config, denoiser.edge, denoiser.text, batch)
        return cls(denoiser, device, dtype, rank, base, inputs)

    def twin(self) -> Any:
        """A model of its own modules and hooks, with the very weights of the others."""
        return copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})

    def loss(self, model: nn.Module, *, asks_for_input: bool = False) -> Tensor:
        """The mean square of a prediction, under autocast in the format of the weights."""
        name = "sample" if "sample" in self.inputs else "hidden_states"
        own = self.inputs[name].detach().requires_grad_(asks_for_input)
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if is_mixed else None, enabled=is_mixed):
            output: Tensor = model(**self.inputs | {name: own}, return_dict=False)[0]
        return output.float().square().mean()

    def with_tlora(self, model: Any) -> LycorisAdapter:
        """Attach a T-LoRA to attention and feed-forward, slightly off its start."""
        values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": self.rank, "linear_alpha": self.rank}
        preset = {"apply_preset": {"target_module": ["Attention", "FeedForward"]}}
        config = LycorisConfig.model_validate({**values, **preset, "raw": values})
        adapter = LycorisAdapter.create(model, config, spec=self.denoiser.spec, seed=0)
        generator = torch.Generator(self.device).manual_seed(2)
        with torch.no_grad():
            for parameter in adapter.parameters():
                noise = torch.randn(parameter.shape, generator=generator, device=self.device)
                parameter.add_(noise * 1e-2)
        return adapter

    def with_peft(self, model: Any, targets: Sequence[str]) -> list[nn.Parameter]:
        """Attach PEFT's LoRA to these layers; the trained parameters, in float32."""
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=[*targets])
        inject_adapter_in_model(config, model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        return parameters


def adapted_paths(model: nn.Module) -> list[str]:
    """Paths of the layers that have a T-LoRA."""
    return [
        path.rpartition(".")[0] for path, module in model.named_modules() if isinstance(module, TLoraLayer)
    ]


@contextmanager
def no_gradients_left(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Free the gradients of these parameters at the end."""
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None

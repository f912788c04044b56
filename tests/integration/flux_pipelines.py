"""Every bundled Flux.1 pipeline on a tiny model that it fits, with the call that it needs."""

from __future__ import annotations

import functools
import inspect
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from PIL import Image

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.models.flux import pipeline as bundled
from simpletuner.helpers.models.flux.spec import SPEC
from simpletuner.helpers.models.flux.tiny import make_transformer, save_tiny_flux
from simpletuner.helpers.models.tiny_parts import fill_weights
from tests.integration.attached import attach_tlora

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
SIZE = {"height": 64, "width": 64}
TOKEN = 16
"""Width of a token of the tiny model."""
FILL_MASK = 256
"""Of a token's mask: 2 x 2 patches of 8 x 8 pixels."""


def _widened(in_channels: int) -> FluxTransformer2DModel:
    """A transformer whose tokens carry more than the latents that it predicts."""
    names = inspect.signature(FluxTransformer2DModel).parameters
    config = {name: value for name, value in make_transformer().config.items() if name in names}
    transformer = FluxTransformer2DModel(**{**config, "in_channels": in_channels, "out_channels": TOKEN})
    fill_weights(transformer, seed=3)
    return transformer


def _control_net() -> FluxControlNetModel:
    control = FluxControlNetModel.from_transformer(
        make_transformer(),
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        load_weights_from_transformer=False,
    )
    fill_weights(control, seed=4)
    return control


@dataclass(frozen=True)
class Case:
    """A pipeline class by its name, what it is made of beside the tiny model, and what its call needs."""

    name: str
    call: dict[str, Any] = field(default_factory=dict)
    starts_from_image: bool = False
    in_channels: int | None = None
    has_control_net: bool = False
    is_guided: bool = True
    """Whether its call has a second pass with a negative prompt."""

    def __str__(self) -> str:
        return self.name

    def make(self, source: Any = bundled) -> Any:
        """The pipeline, bundled or of diffusers, with the same weights each time."""
        parts: dict[str, Any] = {}
        if self.in_channels is not None:
            parts["transformer"] = _widened(self.in_channels)
        if self.has_control_net:
            parts["controlnet"] = _control_net()
        pipeline = vars(source)[self.name] if source is bundled else source(self.name)
        made = pipeline.from_pretrained(tiny_flux(), **parts)
        made.set_progress_bar_config(disable=True)
        return made


_MASK = {"mask_image": PICTURE.convert("L")}
_EDIT = {"image": PICTURE, "_auto_resize": False, "max_area": 64 * 64, **SIZE}
_CONTROL = {"control_image": PICTURE, **SIZE}
CASES = (
    Case("FluxPipeline", SIZE),
    Case("FluxImg2ImgPipeline", {"image": PICTURE, **SIZE}, starts_from_image=True),
    Case("FluxInpaintPipeline", {"image": PICTURE, **_MASK, **SIZE}, starts_from_image=True),
    Case(
        "FluxFillPipeline",
        {"image": PICTURE, **_MASK, **SIZE},
        in_channels=2 * TOKEN + FILL_MASK,
        is_guided=False,
    ),
    Case("FluxKontextPipeline", _EDIT),
    Case("FluxKontextInpaintPipeline", {**_EDIT, **_MASK}, starts_from_image=True),
    Case("FluxControlPipeline", _CONTROL, in_channels=2 * TOKEN, is_guided=False),
    Case(
        "FluxControlImg2ImgPipeline",
        {"image": PICTURE, **_CONTROL},
        starts_from_image=True,
        in_channels=2 * TOKEN,
        is_guided=False,
    ),
    Case(
        "FluxControlInpaintPipeline",
        {"image": PICTURE, **_MASK, **_CONTROL},
        starts_from_image=True,
        in_channels=2 * TOKEN,
        is_guided=False,
    ),
    Case("FluxControlNetPipeline", _CONTROL, has_control_net=True),
    Case(
        "FluxControlNetImg2ImgPipeline",
        {"image": PICTURE, **_CONTROL},
        starts_from_image=True,
        has_control_net=True,
        is_guided=False,
    ),
    Case(
        "FluxControlNetInpaintPipeline",
        {"image": PICTURE, **_MASK, **_CONTROL},
        starts_from_image=True,
        has_control_net=True,
        is_guided=False,
    ),
)
TEXT_TO_IMAGE = CASES[0]


@functools.cache
def tiny_flux() -> Path:
    """A tiny Flux.1 in the diffusers layout, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny_flux_"))
    save_tiny_flux(folder)
    return folder


def stock(name: str) -> type[diffusers.DiffusionPipeline]:
    """diffusers' own class."""
    found: type[diffusers.DiffusionPipeline] = getattr(diffusers, name)
    return found


def attach(pipeline: Any, **options: Any) -> LycorisAdapter:
    """A T-LoRA of rank 8 whose factors are off their start."""
    return attach_tlora(pipeline.transformer, SPEC, off_start=0.1, **options)


def sample(pipeline: Any, case: Case = TEXT_TO_IMAGE, **options: Any) -> np.ndarray:
    """A picture of the case's call, [H, W, 3]."""
    call = {"num_inference_steps": 4, "guidance_scale": 3.5, "output_type": "np", **case.call, **options}
    picture: np.ndarray = pipeline(
        prompt="a photo of sks cat", generator=torch.Generator().manual_seed(5), **call
    ).images[0]
    return picture
